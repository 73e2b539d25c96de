"""`inspect` on adapters with known changes, against what the model in memory says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qdora
from qdora import AdapterConfig, CheckpointError, ConfigError
from qdora.adapterfile import CONFIG_FILE, WEIGHTS_FILE
from qdora.inject import adapted_linears
from qdora.shards import ShardReader, fingerprint
from qdora.verbs.inspect import InspectReport, inspect
from tests.conftest import disturb, make_model

PNG = b"\x89PNG"


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A copy to write a picture to."""
    return shutil.copytree(tiny_adapter, tmp_path / "adapter")


def saved(base: Path, out: Path, config: AdapterConfig, load_in_4bit: bool = True, seed: int = 0) -> Path:
    model = qdora.load_model(base, adapter=config, load_in_4bit=load_in_4bit)
    disturb(model, seed)
    qdora.save_adapter(model, out)
    return out


def width(report: InspectReport) -> int:
    return max(map(len, str(report).splitlines()))


def test_an_adapter_and_the_base_that_it_names(adapter: Path, tiny_nf4: Path) -> None:
    report = inspect(adapter)
    assert (report.base, report.base_kind, report.trained_kind) == (str(tiny_nf4), "nf4", "nf4")
    assert report.same_base is True
    assert report.base_hash == fingerprint(ShardReader(tiny_nf4))
    assert report.picture == adapter / "inspect.png"
    assert report.picture.read_bytes().startswith(PNG)
    assert report.values == sum(t.numel() for t in load_file(adapter / WEIGHTS_FILE).values())
    assert report.file_bytes == (adapter / WEIGHTS_FILE).stat().st_size
    assert report.unmoved == []

    layers = adapted_linears(qdora.load_model(tiny_nf4, adapter=adapter, dtype="float32"))
    assert [change.path for change in report.changes] == list(layers)
    for change in report.changes:
        layer = layers[change.path]
        W = layer.base.dequantize().double()
        V = W + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        moved = (layer.magnitude().double() - W.norm(dim=1)).abs().mean()
        assert change.delta_m == pytest.approx(float(moved), rel=1e-3)  # the layer's offset is bf16
        assert change.delta_d == pytest.approx(float((1 - torch.cosine_similarity(V, W)).mean()), rel=1e-6)
    assert [c.relative_delta_m for c in report.most_in_magnitude] == sorted(
        (c.relative_delta_m for c in report.changes if c.relative_delta_m is not None), reverse=True
    )[:5]
    assert [c.delta_d for c in report.most_in_direction] == sorted((c.delta_d for c in report.changes), reverse=True)[
        :5
    ]


def test_what_it_says(adapter: Path) -> None:
    report = inspect(adapter)
    text = str(report)
    for part in (
        "DoRA, rank 4, alpha 8",
        "14 linears",
        "A and B in bfloat16",
        "the weights that the adapter was trained on",
        "q_proj",
        "most in magnitude",
        "most in direction",
        "did not move    0 of 14 linears",
        "inspect.png",
    ):
        assert part in text, part
    assert width(report) <= 100
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["method"] == "DoRA"
    assert content["same_base"] is True
    assert len(content["linears"]) == 14
    assert set(content["correlation_by_kind"]) == {change.kind for change in report.changes}
    assert content["correlation_by_kind"]["q_proj"] is None  # two layers
    assert -1 <= content["correlation"] <= 1


def test_lora_changes_both(tiny_nf4: Path, tmp_path: Path) -> None:
    config = AdapterConfig(
        rank=4, use_dora=False, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=("q_proj", "v_proj")
    )
    report = inspect(saved(tiny_nf4, tmp_path / "lora", config))
    assert all(change.delta_m > 0 and change.delta_d > 0 for change in report.changes)
    assert [change.rank for change in report.changes] == [2, 4, 2, 4]
    text = str(report)
    assert "LoRA, rsLoRA's scaling, rank 4, alpha 32; rank 2 in q_proj" in text
    assert "2–4" in text
    assert "m = ‖W + s·B·A‖" in text.replace("\n", " ")


def test_what_did_not_move_is_named(tiny_nf4: Path, tmp_path: Path) -> None:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4))
    layers = adapted_linears(model)
    qdora.save_adapter(model, tmp_path / "fresh")
    fresh = inspect(tmp_path / "fresh")
    assert fresh.unmoved == list(layers)
    assert (fresh.most_in_magnitude, fresh.most_in_direction) == ([], [])
    assert "14 of 14 linears: model.layers.0" in str(fresh)
    assert "and 4 more" in str(fresh).replace("\n" + " " * 16, " ")
    assert "none moved" in str(fresh)
    assert fresh.to_dict()["correlation"] is None

    names = list(layers)
    with torch.no_grad():
        layers[names[0]].lora_B.fill_(1e-3)
        layers[names[1]].magnitude_offset.fill_(1e-3)
    qdora.save_adapter(model, tmp_path / "two")
    two = inspect(tmp_path / "two")
    assert two.unmoved == names[2:]
    assert [c.path for c in two.most_in_magnitude] == [names[1]]
    assert [c.path for c in two.most_in_direction] == [names[0]]
    assert "12 of 14 linears" in str(two)
    assert "1 more not in magnitude" in str(two)
    assert "1 more not in direction" in str(two)


def test_the_16_bit_original_is_rounded_and_the_difference_said(
    adapter: Path, tiny: Path, tiny_nf4: Path, tmp_path: Path
) -> None:
    on_nf4, on_original = inspect(adapter), inspect(adapter, tiny)
    assert on_original.base_kind == "16-bit rounded through nf4"
    assert on_original.same_base is False
    assert on_original.changes == on_nf4.changes
    assert "the weights that the adapter was trained on" in str(on_original)

    loaded_in_4bit = saved(tiny, tmp_path / "a", AdapterConfig(rank=2))
    assert inspect(loaded_in_4bit).same_base is True
    elsewhere = inspect(loaded_in_4bit, tiny_nf4)
    assert elsewhere.same_base is False
    assert "the weights that the adapter was trained on" in str(elsewhere)

    qdora.quantize(tiny, tmp_path / "custom", double_quant=False)
    custom = saved(tmp_path / "custom", tmp_path / "c", AdapterConfig(rank=2))
    original = inspect(custom, tiny)
    assert original.base_kind == "16-bit"
    assert "the same weights, but rounded in another way" in " ".join(str(original).split())
    assert inspect(custom).same_base is True


def test_another_base_and_an_adapter_that_names_none(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", initializer_range=0.4)  # type: ignore[arg-type]
    dense = saved(tiny, tmp_path / "dense", AdapterConfig(rank=2), load_in_4bit=False)
    report = inspect(dense, other)
    assert (report.same_base, report.base_kind) == (False, "16-bit")
    assert report.right_base is False
    assert report.base_is in " ".join(str(report).split())
    assert "are others (by a probe, 75% apart" in report.base_is

    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file(tensors, adapter / WEIGHTS_FILE)  # as PEFT writes it: without our metadata
    report = inspect(adapter, tiny)
    assert (report.same_base, report.trained_kind, report.base_kind) == (None, None, "16-bit")
    assert "does not record which weights it was trained on" in " ".join(str(report).split())

    config = json.loads((adapter / CONFIG_FILE).read_text())
    for name, message in [
        (None, "does not say which base .* name it with --base"),
        ("gone", "no model at gone.*--base"),
    ]:
        (adapter / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(CheckpointError, match=message):
            inspect(adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_peft_began_has_not_moved(dtype: torch.dtype, tiny_nf4: Path, tiny: Path, tmp_path: Path) -> None:
    """PEFT rounds the first magnitude to the dtype of the base; that is no training."""
    for base in (tiny, tiny_nf4):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / "a")
        report = inspect(tmp_path / "a", base)
        assert len(report.unmoved) == len(report.changes) == 4


def test_pictures(adapter: Path, tmp_path: Path) -> None:
    report = inspect(adapter, picture=tmp_path / "mine.png")
    assert report.picture == tmp_path / "mine.png"
    assert report.picture.read_bytes().startswith(PNG)
    assert not (adapter / "inspect.png").exists()
    (adapter / "inspect.png").mkdir()  # in the way, as a directory that cannot be written would be
    report = inspect(adapter)
    assert report.picture is None
    assert "no picture: " in str(report)
    assert "--picture" in " ".join(str(report).split())
    for wrong, message in [
        (tmp_path / "mine.jpg", r"ends in \.png"),
        (adapter / "inspect.png", "is a directory"),
        (tmp_path / "absent" / "mine.png", "which is no directory"),
    ]:
        with pytest.raises(ConfigError, match=message):
            inspect(adapter, picture=wrong)


def test_long_names_stay_within_the_width(adapter: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("directory-with-a-long-name-" * 4) / "base"
    shutil.copytree(tiny_nf4, deep)
    assert width(inspect(adapter, deep)) <= 100


def test_refusals(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter"):
        inspect(tiny)
    with pytest.raises(CheckpointError, match="not a linear of this base"):
        inspect(adapter, make_model(tmp_path / "shallow", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        inspect(adapter, adapter)
