"""Where a model comes from: a directory, the Hub, a GGUF file; and what travels with it besides its weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qdora.adapterfile import CONFIG_FILE
from qdora.errors import CheckpointError, reason
from qdora.kinship import MERGE_RECORD, QUANTIZE_RECORD
from qdora.output import TEMPLATES
from qdora.shards import INDEX_FILE

__all__ = [
    "check_complete",
    "check_model",
    "copy_side_files",
    "find_gguf",
    "gguf_to_directory",
    "local_model",
    "quietly",
    "unusable",
]

_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_NOT_COPIED = (INDEX_FILE, "config.json", CONFIG_FILE, "trainer_state.json", QUANTIZE_RECORD, MERGE_RECORD)
# The same weights once more, as their makers' own programs read them.
_NOT_FETCHED = ("consolidated*.safetensors", "original/*")


def local_model(path: str | Path) -> Path:
    """The directory of a model: `path` itself, or a Hub id's files, downloaded.

    Raises:
        CheckpointError: no such directory, and no such model on the Hub.
    """
    if _is_here(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *_SIDE_FILES]
    with _of_the_hub(path):
        fetched = Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=list(_NOT_FETCHED)))
    if not any(fetched.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} has no safetensors on the Hub; name a copy that has, or convert it and name the directory"
        )
    return fetched


def check_model(path: str | Path) -> None:
    """That `local_model` would find a model there, as far as its config tells; of a Hub id nothing else is fetched.

    Raises:
        CheckpointError: it would not.
    """
    if not _is_here(path):
        from huggingface_hub import hf_hub_download

        with _of_the_hub(path):
            hf_hub_download(str(path), "config.json")


def _is_here(path: str | Path) -> bool:
    """Whether it is a model's directory rather than a Hub id.

    Raises:
        CheckpointError: it is neither.
    """
    directory = Path(path)
    if (directory / "config.json").is_file():
        return True
    if (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path} is an adapter, not a model; name the model it was trained on")
    if find_gguf(path) is not None:
        raise CheckpointError(f"{path} is a model in GGUF; quantize it first: qdora quantize {path} OUT")
    if directory.is_dir():
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(f"no model at {path}: expected a directory with config.json, or a Hub id (owner/name)")
    return False


@contextmanager
def _of_the_hub(path: str | Path) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"no model at {path}: not a directory here, and the Hub gave none ({reason(error)})"
        ) from None


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that `path` is or, being a directory without a config, holds.

    Raises:
        CheckpointError: the directory holds several, or the file is a part of one.
    """
    candidate = Path(path)
    if candidate.suffix == ".gguf" and candidate.is_file():
        _check_whole(candidate)
        return candidate
    if not candidate.is_dir() or (candidate / "config.json").is_file():
        return None
    files = sorted(candidate.glob("*.gguf"))
    for file in files[:1]:
        _check_whole(file)
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files ({files[0].name}, …); name one of them")
    return files[0] if files else None


def _check_whole(file: Path) -> None:
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", file.name)
    if part and int(part[2]) > 1:
        joined = file.name[: part.start()] + ".gguf"
        raise CheckpointError(
            f"{file} is one of {int(part[2])} parts of a model; join them with llama.cpp's "
            f"`llama-gguf-split --merge {file.name[: part.start()]}-00001-of-{part[2]}.gguf {joined}`"
        )


def gguf_to_directory(file: Path, directory: Path, dtype: torch.dtype, max_shard_size: int) -> None:
    """Unpack a GGUF file to a model directory. Unlike the rest, this holds the whole model in memory.

    Raises:
        CheckpointError: damaged, or of an architecture that transformers does not read from GGUF.
    """
    try:
        with quietly():
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
            )
            check_complete(found, file, "header")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(directory)
    except CheckpointError:
        raise
    except Exception as error:
        # gguf and transformers raise IndexError, struct.error, KeyError and more on a damaged file
        raise CheckpointError(f"{file} cannot be read as GGUF: {reason(error)}") from None


def check_complete(found: dict[str, Any], path: str | Path, described_by: str = "config.json") -> None:
    """What is not in the checkpoint would have random values, and transformers only warns of it.

    Args:
        found: transformers' loading info.
        described_by: what of it says which weights there must be.

    Raises:
        CheckpointError: weights are missing, or of other shapes.
    """
    missing, mismatched = sorted(map(str, found["missing_keys"])), sorted(map(str, found["mismatched_keys"]))
    if missing or mismatched:
        what = f"{len(missing)} weights are missing" if missing else f"{len(mismatched)} weights have another shape"
        raise CheckpointError(
            f"{path} does not hold the model of its {described_by}: {what}, first {(missing or mismatched)[0]}; "
            "download or write it again"
        )


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config: whatever travels with a model besides weights and config."""
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, target / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def unusable(path: str | Path, what: str, error: Exception) -> CheckpointError:
    """What it means that transformers could not read `what` of a model: it is damaged, or brings code of its own."""
    if "trust_remote_code" in str(error):
        return CheckpointError(
            f"{path} brings Python code of its own, which runs only with --trust_remote_code; read that code first"
        )
    return CheckpointError(f"{path} has no usable {what}: {reason(error)}")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' loading bars and advice out of our output; errors still come as exceptions."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
