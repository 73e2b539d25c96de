"""`qdora estimate` of models far too large for this machine, and what it says to a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, MambaConfig

import qdora
from qdora import CheckpointError, ConfigError
from qdora.cli import main

CONFIGS = Path(__file__).parent / "configs"
LEAN: dict[str, Any] = {"activation_offloading": True, "embedding_on_host": True}
ROW: dict[str, Any] = {"max_length": 2048, "per_device_train_batch_size": 1, "lora_r": 16}


@pytest.mark.parametrize(
    ("model", "flags", "at_most"),
    [
        ("Llama-3.1-8B", LEAN, 6.0e9),
        ("Llama-3.1-8B", {**LEAN, "stream_base": True}, 2.5e9),
        ("Llama-3.1-70B", {**LEAN, "stream_base": True}, 8.0e9),
        ("Mistral-7B", LEAN, 6.0e9),
        ("Qwen2.5-32B", {**LEAN, "stream_base": True}, 8.0e9),
    ],
)
def test_what_large_models_need(model: str, flags: dict[str, Any], at_most: float) -> None:
    found = qdora.estimate(CONFIGS / model, **ROW, **flags)
    assert 0 < found.need.device_bytes <= at_most
    assert found.need.host_bytes > 0


def test_known_sizes_of_an_8b() -> None:
    """What can be counted by hand: 6.98e9 weights in linears at 4.127 bits, and two matrices of the vocabulary."""
    parts = qdora.estimate(CONFIGS / "Llama-3.1-8B", **ROW).need.parts
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert parts["base weights"] == pytest.approx(linears * (4 + 8 / 64 + 32 / (64 * 256)) / 8, rel=1e-3)
    assert parts["embeddings and head"] == 2 * 2 * 128256 * 4096
    values = 32 * (
        16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) + (3 * 4096 + 2 * 1024 + 2 * 14336)
    )
    assert parts["optimizer state"] == pytest.approx(6 * values, rel=1e-3)
    assert parts["kept layer inputs"] == 32 * 2048 * 4096 * 2


def test_a_plan_fits_and_can_be_given_as_flags() -> None:
    found = qdora.estimate(CONFIGS / "Llama-3.1-8B", **{**ROW, "per_device_train_batch_size": 4}, memory="8GB")
    assert found.usable_bytes is not None
    assert found.need.device_bytes <= found.usable_bytes < 8e9
    assert found.plan.rows * found.plan.accumulation == 4
    assert found.plan.flags() in str(found)
    assert not found.plan.hold_outputs
    for asked, held in ((None, True), (False, False)):
        flags = {**ROW, **({} if asked is None else {"hold_outputs": asked})}
        assert qdora.estimate(CONFIGS / "Llama-3.1-8B", **flags, memory="24GB").plan.hold_outputs is held
    assert "fits in 8GB" in str(found)


def test_the_command(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    model = str(tiny)
    assert main(["estimate", model, "--max_length", "64", "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    for word in ("base weights", "optimizer state", "peak", "flags: --per_device_train_batch_size"):
        assert word in out
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {model}\nmax_length: 64\nmemory: 1GB\n")
    assert main(["estimate", str(config)]) == 0
    assert capsys.readouterr().out == out
    assert list(tmp_path.iterdir()) == [config]


def test_of_a_file_of_a_directory_and_of_a_checkpoint(tiny: Path, tiny_nf4: Path) -> None:
    settings: dict[str, Any] = {"use_cpu": True, "max_length": 64}
    needs = [qdora.estimate(path, **settings).need for path in (tiny, tiny / "config.json", tiny_nf4)]
    assert needs[0] == needs[1] == needs[2]


@pytest.mark.parametrize(
    ("flags", "error", "says"),
    [
        ({"memory": "1.5GB"}, ConfigError, "nothing fits in .* the least is"),
        ({"memory": "lots"}, ConfigError, "lots"),
        ({"memory": "0.3GB"}, ConfigError, "leaves nothing beside the .* of the driver"),
        ({"dry_run": True}, ConfigError, "is for `qdora train`"),
        ({"lora_target_modules": ["nothing"]}, ConfigError, "matches no linear"),
        ({"loss_chunk_size": "big"}, ConfigError, "big"),
        ({"activation_offloading": True, "gradient_checkpointing": False}, ConfigError, "needs gradient_checkpointing"),
        ({"max_length": 0}, ConfigError, "max_length"),
        ({"per_device_train_batch_size": 0}, ConfigError, "per_device_train_batch_size"),
    ],
)
def test_mistakes(flags: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        qdora.estimate(CONFIGS / "Mistral-7B", **{**ROW, **flags})


def test_heads_that_are_scored_with_all_logits(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    Gemma2Config(**shape, num_key_value_heads=2, head_dim=16, vocab_size=64000).save_pretrained(tmp_path)
    need = qdora.estimate(tmp_path, **ROW).need
    assert need.device_bytes > 2048 * 64000 * 4 * 2
    large = CONFIGS / "Llama-3.1-8B"
    smoothed, plain = (qdora.estimate(large, **ROW, label_smoothing_factor=amount).need for amount in (0.1, 0.0))
    assert smoothed.device_bytes > plain.device_bytes


def test_a_model_whose_code_reads_weights(tmp_path: Path) -> None:
    MambaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=256).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot reckon with MambaForCausalLM"):
        qdora.estimate(tmp_path, **ROW)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        qdora.estimate(tmp_path)
    assert main(["estimate", str(tmp_path)]) == 2
