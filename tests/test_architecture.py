"""What is read off a config, and what no config may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig

from qdora import CheckpointError, ConfigError
from qdora.architecture import context_of, hollow_model, is_nf4_checkpoint, load_config, model_linears
from qdora.config import AdapterConfig
from qdora.inject import adapted_linears
from qdora.nf4 import NF4Weight


def test_linears_and_what_is_skipped(tiny: Path) -> None:
    linears = model_linears(tiny, ("model.layers.0",))
    assert len(linears.shapes) == 14
    assert linears.find("model.layers.1.mlp.down_proj.weight") == "model.layers.1.mlp.down_proj"
    assert linears.quantizes("model.layers.1.mlp.down_proj")
    assert not linears.quantizes("model.layers.0.mlp.down_proj")
    assert linears.find("model.embed_tokens.weight") is None
    with pytest.raises(ConfigError, match="matches no module"):
        model_linears(tiny, ("absent",))


def test_what_a_config_says(tiny: Path, tiny_nf4: Path) -> None:
    assert [is_nf4_checkpoint(path) for path in (tiny, tiny_nf4)] == [False, True]
    assert context_of(load_config(tiny, trust_remote_code=False)) == 512


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        (BitsAndBytesConfig(load_in_4bit=True).to_dict(), "fp4"),
        ({"load_in_4bit": True}, "fp4"),
        (BitsAndBytesConfig(load_in_8bit=True).to_dict(), "8-bit bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "nf4"}, "nf4"),
    ],
)
def test_how_a_model_is_quantized_is_named(
    quantization: dict[str, object], kind: str, tiny: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=f"is quantized as {kind}; start from its 16-bit original, or from NF4$"):
        is_nf4_checkpoint(tmp_path)


def test_a_hollow_model_has_the_shapes_and_no_values(tiny: Path, tiny_nf4: Path) -> None:
    for path, in_4bit in ((tiny, True), (tiny_nf4, False)):
        model = hollow_model(path, AdapterConfig(rank=2), load_in_4bit=in_4bit)
        linears = adapted_linears(model).values()
        assert len(linears) == 14
        assert all(isinstance(linear.base, NF4Weight) for linear in linears)
        assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ({"quantization_config": {"llm_int8_skip_modules": ["(.+)+$x"]}}, "no name nor a simple pattern"),
    ],
)
def test_a_config_that_would_take_hours(
    changes: dict[str, object], message: str, tiny_nf4: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_nf4 / "config.json").read_text())
    nested = changes.get("quantization_config", {})
    merged = config | changes | {"quantization_config": config["quantization_config"] | nested}  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps(merged))
    with pytest.raises(CheckpointError, match=message):
        model_linears(tmp_path)


def test_a_number_that_counts_no_layers(tiny_nf4: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_nf4 / "config.json").read_text()) | {"vocab_size_per_layer_input": 262_144}  # Gemma 3n's
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(model_linears(tmp_path).shapes) == 14
