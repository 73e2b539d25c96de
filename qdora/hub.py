"""A finished adapter to the Hub: whether that may be done is asked before the training, and it is done once, after it.

The trainer's own way uploads in between as well, before there is a report, and its failures come hours late. So it is
told nothing of the Hub. Whatever goes wrong here, the adapter stands whole in its directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from qdora.adapterfile import CONFIG_FILE, WEIGHTS_FILE
from qdora.distributed import is_main
from qdora.errors import ConfigError, QDoRAError, reason
from qdora.output import TEMPLATE_FILE, TEMPLATES, TOKENIZER_FILES

__all__ = ["Destination", "take_destination"]

# What the adapter is, and nothing else that may lie in its directory. The report stays here: it shows a row of the data
# and names places on this machine.
_GOES_UP = [
    *(CONFIG_FILE, WEIGHTS_FILE, "README.md", "loss.png", "log.csv"),
    *(*TOKENIZER_FILES, TEMPLATE_FILE, f"{TEMPLATES}/*.jinja"),
]


@dataclass(frozen=True)
class Destination:
    """A repository that may be written to."""

    name: str
    """`owner/name`."""
    token: str | None
    revision: str | None

    def publish(self, directory: Path) -> str:
        """Upload an adapter in one commit: its files, tokenizer, card, curve and log.

        Returns:
            Where it is.

        Raises:
            QDoRAError: the Hub refused it or was not reached.
        """
        try:
            found = HfApi(token=self.token).upload_folder(
                repo_id=self.name,
                folder_path=directory,
                revision=self.revision,
                commit_message="Upload adapter",
                allow_patterns=_GOES_UP,
            )
        except Exception as error:
            # a network fails in many ways
            raise QDoRAError(
                f"the adapter is in {directory}, but was not uploaded to {self.name}: {reason(error)}; "
                f"`hf upload {self.name} {directory} --include 'adapter_*' README.md 'tokenizer*'` tries again"
            ) from None
        return str(found.commit_url)


def take_destination(training: Any) -> Destination | None:
    """Where `--push_to_hub` means the adapter to go, from the training settings, which lose the flag.

    None without the flag, and in every process but the main one.

    The repository is made, if need be, for nothing else shows that it may be written to.

    Raises:
        ConfigError: nobody is logged in, the repository may not be written to, or the Hub is not reached.
    """
    if not training.push_to_hub:
        return None
    training.push_to_hub = False
    if not is_main():
        return None
    strategy = training.hub_strategy.value
    if "checkpoint" in strategy:
        raise ConfigError(f"--hub_strategy {strategy}: checkpoints stay here, the adapter is uploaded at the end")
    api, name = HfApi(token=training.hub_token), training.hub_model_id or Path(training.output_dir).absolute().name
    try:
        who = api.whoami()["name"]
    except Exception as error:
        # a network fails in many ways
        raise ConfigError(
            f"--push_to_hub: not logged in to {api.endpoint} ({reason(error)}); `hf auth login`, or give --hub_token"
        ) from None
    try:
        made = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    except Exception as error:
        # a network fails in many ways
        raise ConfigError(
            f"--push_to_hub: {who} may not write to {name} ({reason(error)}); name another with --hub_model_id"
        ) from None
    return Destination(made.repo_id, training.hub_token, training.hub_revision)
