"""Where models come from, and what travels with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdora.errors import CheckpointError
from qdora.sources import copy_side_files, find_gguf, gguf_to_directory, local_model


def test_a_directory_is_itself_and_anything_else_is_named(tiny: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    assert local_model(tiny) == tiny
    (tmp_path / "file").write_text("x")
    for path, message in [
        (tiny_adapter, "is an adapter, not a model; name the model it was trained on"),
        (tmp_path, "is not a model directory: it has no config.json"),
        (tmp_path / "absent", "expected a directory with config.json, or a Hub id"),
        (tmp_path / "file", "expected a directory"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            local_model(path)


def test_a_gguf_file_is_found_alone_or_in_its_directory(tiny: Path, tmp_path: Path) -> None:
    assert find_gguf(tiny) is None
    assert find_gguf(tmp_path) is None
    (tmp_path / "a.gguf").write_text("x")
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_text("x")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        find_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        gguf_to_directory(tmp_path / "a.gguf", tmp_path / "out", torch.bfloat16, 10**9)


def test_what_travels_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "vocab.txt", "modeling_own.py"}
    for name in (*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert {path.name for path in target.iterdir()} == kept
