"""Adapters that begin with the quantization error, against a dense SVD in fp64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.inject import adapted_linears
from qdora.residual import begin_with_residual
from tests.conftest import make_model
from tests.test_numerics import spoil


def load(nf4: Path, **settings: object) -> torch.nn.Module:
    config = qdora.AdapterConfig(**{"rank": 6, "alpha": 3, "dtype": "float32", **settings})  # type: ignore[arg-type]
    return qdora.load_model(nf4, adapter=config, dtype="float32")


@pytest.mark.parametrize("use_dora", [True, False])
def test_it_is_the_best_of_that_rank(tiny: Path, tiny_nf4: Path, use_dora: bool) -> None:
    model = load(tiny_nf4, use_dora=use_dora)
    report = begin_with_residual(model, tiny)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    whole = left = gone = 0.0
    for path, layer in adapted_linears(model).items():
        original = plain.get_submodule(path).weight.detach()
        error = original - layer.base.dequantize().double()
        ours = error - layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        best = torch.linalg.svdvals(error)[6:].square().sum()
        assert best <= ours.square().sum() <= 1.02 * best + 1e-12, path
        assert torch.allclose(layer.merged_weight().double(), original - ours, atol=1e-5)
        whole, left, gone = whole + original.square().sum(), left + ours.square().sum(), gone + error.square().sum()
    assert report.error_after == pytest.approx(float(left / whole) ** 0.5, rel=1e-3)
    assert report.error_before == pytest.approx(float(gone / whole) ** 0.5, rel=1e-3)
    assert report.error_after < 0.95 * report.error_before
    assert "14 adapters begin with" in str(report)


def test_the_model_comes_nearer_to_its_original(tiny: Path, tiny_nf4: Path) -> None:
    ids = torch.arange(40)[None] * 9 % 300
    wanted = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(ids).logits
    model = load(tiny_nf4, rank=16, dtype="bfloat16")
    before = (model(ids).logits - wanted).norm()
    begin_with_residual(model, tiny)
    assert (model(ids).logits - wanted).norm() < 0.8 * before


def test_a_rank_beyond_the_matrix(tiny: Path, tiny_nf4: Path) -> None:
    model = load(tiny_nf4, rank=80, target_modules=("v_proj",))
    assert begin_with_residual(model, tiny).error_after < 1e-5


@pytest.mark.parametrize("use_dora", [True, False])
def test_where_there_is_no_error_it_begins_as_any_adapter(tiny: Path, tmp_path: Path, use_dora: bool) -> None:
    qdora.quantize(tiny, tmp_path / "nf4", skip_modules=["down_proj"])
    model = qdora.load_model(tmp_path / "nf4", adapter=AdapterConfig(rank=4, use_dora=use_dora))
    layers = adapted_linears(model)
    drawn = {path: layer.lora_A.clone() for path, layer in layers.items()}
    begin_with_residual(model, tiny)
    for path, layer in layers.items():
        if path.endswith("down_proj"):
            assert torch.equal(layer.lora_A, drawn[path])
            assert not layer.lora_B.any()
            assert not use_dora or not layer.magnitude_offset.any()
        else:
            assert layer.lora_B.any()


def test_an_original_that_is_not_finite(tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(tiny, tmp_path / "bad")
    spoil(bad, "model.layers.0.mlp.up_proj.weight", float("nan"), row=0)
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    with pytest.raises(CheckpointError, match=r"not finite in the weight of model\.layers\.0\.mlp\.up_proj"):
        begin_with_residual(model, bad)


def test_mistakes(tiny: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is in NF4 itself"):
        begin_with_residual(load(tiny_nf4), tiny_nf4)
    with pytest.raises(CheckpointError, match=r"is another model: .* there and .* here"):
        begin_with_residual(load(tiny_nf4), make_model(tmp_path / "wide", hidden_size=128))
    with pytest.raises(CheckpointError, match=r"is another model: it has no linear 'model\.layers\.1"):
        begin_with_residual(load(tiny_nf4), make_model(tmp_path / "short", num_hidden_layers=1))
    with pytest.raises(ConfigError, match="no adapters"):
        begin_with_residual(qdora.load_model(tiny_nf4), tiny)


def test_as_a_flag(tiny: Path, tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    settings = {"dataset": str(pairs_file), "max_steps": 1, "learning_rate": 0.0, "use_cpu": True, "lora_r": 4}
    for name, source in (("both", {"original_model_name_or_path": str(tiny)}), ("itself", {})):
        base = str(tiny if name == "itself" else tiny_nf4)
        qdora.train(
            model_name_or_path=base,
            output_dir=str(tmp_path / name),
            init_lora_weights="loftq",
            save_strategy="no",
            **settings,
            **source,
        )
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    with pytest.raises(ConfigError, match="name the 16-bit original"):
        qdora.train(
            model_name_or_path=str(tiny_nf4), output_dir=str(tmp_path / "x"), init_lora_weights="loftq", **settings
        )
