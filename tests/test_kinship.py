"""Right pairs are never refused, wrong ones never pass in silence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qdora
from qdora import AdapterConfig, CheckpointError
from qdora.adapterfile import WEIGHTS_FILE, read_adapter
from qdora.distributed import say_once
from qdora.kinship import QUANTIZE_RECORD, Ancestry, Kinship, kinship
from tests.conftest import disturb, make_model

SHARED = {"num_hidden_layers": 1, "num_key_value_heads": 2}


def trained(base: Path, out: Path, **settings: Any) -> Path:
    model = qdora.load_model(base, adapter=AdapterConfig(rank=2), **settings)
    disturb(model)
    qdora.save_adapter(model, out)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit model and it in NF4, adapters trained on both, and another model with its NF4."""
    place = tmp_path_factory.mktemp("kin")
    make_model(place / "model", **SHARED)
    other = make_model(place / "other", **SHARED)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    save_file(
        {key: torch.randn_like(w) * 0.1 for key, w in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    for name in ("model", "other"):
        qdora.quantize(place / name, place / f"{name}-nf4")
    trained(place / "model-nf4", place / "on-nf4")
    trained(place / "model", place / "on-the-fly")
    trained(place / "model", place / "on-dense", load_in_4bit=False)
    return place


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="qdora")
    say_once.cache_clear()
    return caplog


@pytest.mark.parametrize("adapter", ["on-nf4", "on-the-fly", "on-dense"])
@pytest.mark.parametrize("base", ["model", "model-nf4"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_a_model_and_its_nf4_know_each_other_and_the_rounding(
    place: Path, said: pytest.LogCaptureFixture, adapter: str, base: str, in_4bit: bool
) -> None:
    qdora.load_model(place / base, place / adapter, load_in_4bit=in_4bit)
    if (adapter != "on-dense") == (in_4bit or base == "model-nf4"):
        assert not said.records
        return
    (record,) = said.records
    assert "the same weights, but rounded in another way" in record.message


def test_onto_original_is_recorded_for_what_it_is(place: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    qdora.merge(place / "model", place / "on-nf4", tmp_path / "out", onto_original=True, verify=False)
    assert json.loads((tmp_path / "out" / "qdora_merge.json").read_text())["right_base"] is None
    (record,) = said.records
    assert "rounded in another way" in record.message


def test_what_was_trained_on_16_bits_is_not_merged_onto_nf4(place: Path, tmp_path: Path) -> None:
    pair = place / "model-nf4", place / "on-dense"
    with pytest.raises(CheckpointError, match=r"-dense was trained on 16-bit weights, and \S+-nf4 holds NF4 ones"):
        qdora.merge(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    qdora.merge(*pair, tmp_path / "out", allow_other_base=True)
    assert json.loads((tmp_path / "out" / "qdora_merge.json").read_text())["right_base"] is None


def test_other_shards_are_the_same_weights(place: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="bfloat16")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    qdora.load_model(tmp_path / "shards", place / "on-dense", load_in_4bit=False)
    assert not said.records


def test_another_dtype_or_another_quantizer_is_taken_with_a_word(
    place: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="float32")
    model.save_pretrained(tmp_path / "fp32")
    qdora.load_model(tmp_path / "fp32", place / "on-nf4")
    (unrecorded := shutil.copytree(place / "model-nf4", tmp_path / "nf4")).joinpath(QUANTIZE_RECORD).unlink()
    qdora.load_model(unrecorded, place / "on-dense")
    assert len(said.records) == 2
    assert all("not the files that the adapter was trained on" in record.message for record in said.records)


@pytest.mark.parametrize("adapter", ["on-nf4", "on-the-fly", "on-dense"])
@pytest.mark.parametrize("base", ["other", "other-nf4"])
def test_other_weights_are_refused_everywhere(place: Path, tmp_path: Path, adapter: str, base: str) -> None:
    pair = place / base, place / adapter
    with pytest.raises(CheckpointError, match=r"was not trained on .*other.*--allow_other_base"):
        qdora.load_model(*pair)
    with pytest.raises(CheckpointError, match=rf"^\S+{adapter} was not trained on \S+{base}: the weights"):
        qdora.merge(*pair, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_loaded_later_is_refused_too(place: Path, said: pytest.LogCaptureFixture) -> None:
    model = qdora.load_model(place / "other-nf4")
    with pytest.raises(CheckpointError, match=r"^\S+on-nf4 was not trained on \S+other-nf4: the weights of "):
        qdora.load_adapter(model, place / "on-nf4")
    model = qdora.load_model(place / "other-nf4")
    qdora.load_adapter(model, place / "on-nf4", allow_other_base=True)
    (record,) = said.records
    assert "on-nf4 on " in record.message
    assert "other-nf4: " in record.message


def test_a_probe_of_what_is_not_adapted_is_passed_over(place: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(place / "on-nf4", tmp_path / "adapter")
    file = adapter / WEIGHTS_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    metadata = {"qdora_base": metadata["qdora_base"], "qdora_base_probe": json.dumps({"elsewhere": [1.0] * 16})}
    save_file(load_file(file), file, metadata)
    qdora.load_model(place / "model-nf4", adapter)


def test_evaluate_and_chat_refuse_too(place: Path, pairs_file: Path) -> None:
    with pytest.raises(CheckpointError, match="was not trained on"):
        qdora.evaluate(place / "other-nf4", pairs_file, place / "on-nf4", max_rows=1)
    with pytest.raises(CheckpointError, match="was not trained on"):
        qdora.chat(place / "other-nf4", place / "on-nf4", prompts=["1"])


def test_who_insists_gets_it_and_the_record_says_so(
    place: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    qdora.merge(
        place / "other-nf4", place / "on-nf4", tmp_path / "out", allow_other_base=True, dtype="bfloat16", verify=False
    )
    record = json.loads((tmp_path / "out" / "qdora_merge.json").read_text())
    assert record["right_base"] is False
    assert "others (by a probe" in record["base_is"]
    assert len(said.records) == 1
    assert not (tmp_path / "out" / QUANTIZE_RECORD).exists()
    qdora.merge(place / "model-nf4", place / "on-nf4", tmp_path / "right", verify=False)
    assert json.loads((tmp_path / "right" / "qdora_merge.json").read_text())["right_base"] is True


def test_an_adapter_that_records_nothing_is_taken_with_a_word(
    place: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    bare = shutil.copytree(place / "on-nf4", tmp_path / "bare")
    save_file(load_file(bare / WEIGHTS_FILE), bare / WEIGHTS_FILE, {"format": "pt"})
    for base in ("model-nf4", "other-nf4"):
        qdora.load_model(place / base, bare)
    assert len(said.records) == 2
    assert all("does not record" in record.message and "in 4 bits" in record.message for record in said.records)


def test_a_source_speaks_for_its_own_weights_only(place: Path, tmp_path: Path) -> None:
    forged = shutil.copytree(place / "other-nf4", tmp_path / "forged")
    shutil.copy(place / "model-nf4" / QUANTIZE_RECORD, forged)
    with pytest.raises(CheckpointError, match="was not trained on"):
        qdora.load_model(forged, place / "on-the-fly")


@pytest.mark.parametrize("probe", ["[", "[]", '{"a": 1}', '{"a": ["x"]}', '{"a": [NaN]}', "{" * 100_000])
def test_a_probe_that_is_none_counts_as_not_recorded(place: Path, tmp_path: Path, probe: str) -> None:
    adapter = shutil.copytree(place / "on-nf4", tmp_path / "adapter")
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        metadata = file.metadata() | {"qdora_base_probe": probe}
    save_file(load_file(adapter / WEIGHTS_FILE), adapter / WEIGHTS_FILE, metadata)
    assert read_adapter(adapter).ancestry.probe == {}
    assert read_adapter(place / "on-nf4").ancestry.probe


def test_an_adapter_is_not_applied_to_what_it_is_merged_into(place: Path, tmp_path: Path) -> None:
    """Were its change small, neither hash nor probe would tell."""
    qdora.merge(place / "model-nf4", place / "on-nf4", tmp_path / "merged", verify=False)
    with pytest.raises(
        CheckpointError, match=r"merged: it is merged into these weights already; name its own base, or"
    ):
        qdora.merge(tmp_path / "merged", place / "on-nf4", tmp_path / "twice", verify=False)
    with pytest.raises(CheckpointError, match="it is merged into these weights already"):
        qdora.load_model(tmp_path / "merged", place / "on-nf4", load_in_4bit=False)
    qdora.quantize(tmp_path / "merged", tmp_path / "merged-nf4")
    with pytest.raises(CheckpointError, match="it is merged into these weights already"):
        qdora.load_model(tmp_path / "merged-nf4", place / "on-nf4")
    qdora.merge(tmp_path / "merged", place / "on-dense", tmp_path / "both", verify=False, allow_other_base=True)
    with pytest.raises(CheckpointError, match="it is merged into these weights already"):
        qdora.load_model(tmp_path / "both", place / "on-nf4", load_in_4bit=False)
    (tmp_path / "merged" / "qdora_merge.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"the weights of .* are others"):
        qdora.merge(tmp_path / "merged", place / "on-nf4", tmp_path / "twice", verify=False)


def test_the_three_answers() -> None:
    known = Ancestry("a", "s", probe={"x": (3.0, 4.0)})

    def found(**settings: Any) -> Kinship:
        return kinship(known, Ancestry(**settings), lambda path: (3.1, 4.0), str)

    assert found(hash="a").right is True
    assert found(hash="b", source="s").right is True
    assert found(hash="s").right is True
    assert found(hash="b").right is None
    assert kinship(known, Ancestry("a"), lambda path: (3.3, 4.0), str).right is None
    assert kinship(known, Ancestry("a"), lambda path: None, str).right is True
    assert kinship(Ancestry("a"), Ancestry("a"), lambda path: None, str).right is True
    assert kinship(known, Ancestry("b"), lambda path: (-3.0, 4.0), str).right is False
    assert kinship(known, Ancestry("b"), lambda path: (3.0,), str).right is False
    assert kinship(known, Ancestry("b"), lambda path: None, str).right is None
    assert kinship(Ancestry(), Ancestry(), lambda path: None, str).right is None
