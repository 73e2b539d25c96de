"""Where models come from, and what travels with them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

from qdora.errors import CheckpointError
from qdora.sources import check_model, copy_side_files, find_gguf, gguf_to_directory, local_model


def test_a_directory_is_itself_and_anything_else_is_named(tiny: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    assert local_model(tiny) == tiny
    (tmp_path / "file").write_text("x")
    (tmp_path / "ours.gguf").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "ours.gguf", r"ours.gguf is a model in GGUF; quantize it first: qdora quantize .*ours.gguf OUT"),
        (tiny_adapter, "is an adapter, not a model; name the model it was trained on"),
        (tmp_path / "empty", "is not a model directory: it has no config.json"),
        (tmp_path / "absent", "expected a directory with config.json, or a Hub id"),
        (tmp_path / "file", "expected a directory"),
    ]:
        for look in (local_model, check_model):
            with pytest.raises(CheckpointError, match=message):
                look(path)


def test_of_a_model_on_the_hub_only_the_config_is_fetched_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, ...]] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: fetched.append(names))
    check_model("ada/llama")
    assert fetched == [("ada/llama", "config.json")]

    def offline(*_: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"^no model at ada/llama: not a directory here, and the Hub gave none"):
        check_model("ada/llama")


def test_a_model_of_the_hub_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^ada/old has no safetensors on the Hub; name a copy that has, or"):
        local_model("ada/old")
    (tmp_path / "model.safetensors").touch()
    assert local_model("ada/old") == tmp_path


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


@pytest.mark.parametrize(("blocks", "message"), [(2, None), (1, "9 weights are missing, first model.layers.1")])
def test_a_gguf_file_holds_the_whole_model(blocks: int, message: str | None, tmp_path: Path) -> None:
    """transformers would draw what is missing at random, and say so to nobody."""
    file, out = tmp_path / "a.gguf", tmp_path / "out"
    write_gguf(file, blocks)
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        gguf_to_directory(file, out, torch.bfloat16, 10**9)
    assert (out / "config.json").exists() == (message is None)


def write_gguf(file: Path, blocks: int) -> None:
    """A Llama of two blocks, of which so many are there."""
    writer, draw = gguf.GGUFWriter(file, "llama"), np.random.default_rng(0)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([1] * 32)
    shapes = {"token_embd": (32, 64), "output_norm": (64,), "output": (32, 64)}
    for block in (f"blk.{i}" for i in range(blocks)):
        shapes |= {f"{block}.{name}": (64, 64) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"{block}.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.ffn_gate": (128, 64), f"{block}.ffn_up": (128, 64), f"{block}.ffn_down": (64, 128)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_part_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_text("x")
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        with pytest.raises(CheckpointError, match=r"is one of 2 parts of a model; join them .* m-00001-of-00002.gguf"):
            find_gguf(path)
    (tmp_path / "whole-00001-of-00001.gguf").write_text("x")
    assert find_gguf(tmp_path / "whole-00001-of-00001.gguf") == tmp_path / "whole-00001-of-00001.gguf"


def test_what_travels_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "vocab.txt",
        "modeling_own.py",
        "qwen.tiktoken",
    }
    for name in (*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    (source / "qdora_merge.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("t")
    copy_side_files(source, target)
    assert {path.name for path in target.iterdir()} == {*kept, "additional_chat_templates"}
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "t"
