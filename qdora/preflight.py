"""What may be wrong with a run, found before the long work: its output, its trackers, its original."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
    is_azureml_available,
    is_flytekit_available,
)

from qdora.architecture import is_nf4_checkpoint
from qdora.errors import ConfigError, reason
from qdora.flags import RunArguments
from qdora.sources import local_model

__all__ = ["check_original", "check_place", "check_trackers"]

# Of trackers that are not called as their packages are.
_TRACKER_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit",
}
# Without which transformers takes them for missing.
_TRACKER_SETTINGS = {"comet_ml": "COMET_API_KEY", "kubeflow": "KUBEFLOW_TRAINER_SERVER_URL"}


def check_original(run: RunArguments, trust_remote_code: bool) -> None:
    """That there is something that rounding to NF4 took away, and weights to tell what.

    Raises:
        ConfigError: there is not.
        CheckpointError: the model cannot be read.
    """
    if run.init_lora_weights != "loftq":
        return
    is_packed = is_nf4_checkpoint(local_model(run.model_name_or_path), trust_remote_code)
    if is_packed and not run.original_model_name_or_path:
        raise ConfigError(
            f"--init_lora_weights loftq: {run.model_name_or_path} is in NF4 already; name the 16-bit original with "
            "--original_model_name_or_path"
        )
    if not is_packed and not run.load_in_4bit:
        raise ConfigError("--init_lora_weights loftq makes up for rounding to NF4; --load_in_4bit false rounds nothing")


def check_trackers(names: Sequence[str]) -> None:
    """That the trackers of `--report_to` exist and are installed; the trainer would look once the model is loaded.

    Args:
        names: as transformers leaves them in its settings, with `all` and `none` resolved.

    Raises:
        ConfigError: one is unknown or not installed.
    """
    available = _available_trackers()
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ConfigError(f"--report_to: {reason(error)}") from None
        if name not in available:
            package = _TRACKER_PACKAGES.get(name, name)
            also = _TRACKER_SETTINGS.get(name)
            raise ConfigError(
                f"--report_to {name} needs the package {package}: pip install {package}"
                + (f", and {also} in the environment" if also else "")
            )


def _available_trackers() -> set[str]:
    # transformers' own list knows nothing of flyte, and leaves out azure_ml where there is mlflow.
    others = {"flyte": is_flytekit_available(), "azure_ml": is_azureml_available()}
    return {*get_available_reporting_integrations(), *(name for name, is_there in others.items() if is_there)}


def check_place(output_dir: Path) -> None:
    """That the adapter can be written there, without leaving anything now.

    Raises:
        ConfigError: it cannot.
    """
    there = next(path for path in [output_dir, *output_dir.absolute().parents] if path.exists())
    if not there.is_dir():
        raise ConfigError(f"the output {output_dir} is a file or in one ({there}); name a directory")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {output_dir}: {error.strerror}; choose another --output_dir") from None
    if (output_dir / "config.json").is_file():
        raise ConfigError(f"{output_dir} holds a model; choose another --output_dir for the adapter")
