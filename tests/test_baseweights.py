"""A base read from its files is the base that training had in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qdora
from qdora import AdapterConfig, CheckpointError
from qdora.adapterfile import read_adapter
from qdora.baseweights import StoredBase
from qdora.dense import DenseWeight
from qdora.inject import adapted_linears
from qdora.nf4 import NF4Weight
from qdora.nf4format import is_nf4_key
from tests.conftest import make_model
from tests.test_quantize import make_gpt2


@pytest.mark.parametrize("kind", ["nf4", "16-bit rounded through nf4", "16-bit"])
def test_the_weights_are_those_of_the_loaded_model(kind: str, tiny: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    stored = StoredBase(tiny_nf4 if kind == "nf4" else tiny, through_nf4=kind != "16-bit")
    assert stored.kind == kind
    model = qdora.load_model(
        tiny_nf4 if kind == "nf4" else tiny, adapter=AdapterConfig(rank=2), load_in_4bit=kind != "16-bit"
    )
    keys = stored.adapted_keys(read_adapter(tiny_adapter))
    layers = adapted_linears(model)
    assert list(keys) == list(layers)
    for path, key in keys.items():
        weight = stored.weight(key)
        assert isinstance(weight, DenseWeight if kind == "16-bit" else NF4Weight)
        assert torch.equal(weight.dequantize(torch.float32), layers[path].base.dequantize(torch.float32))
    assert not any(is_nf4_key(key) for key in stored.keys())  # noqa: SIM118 (not a mapping)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(stored.plain("model.embed_tokens.weight"), embedding)


def test_what_is_stored_the_other_way_round_comes_the_right_way(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "gpt2")
    model = qdora.load_model(base, adapter=AdapterConfig(rank=2), load_in_4bit=False)
    qdora.save_adapter(model, tmp_path / "adapter")
    stored = StoredBase(base)
    for path, key in stored.adapted_keys(read_adapter(tmp_path / "adapter")).items():
        expected = adapted_linears(model)[path].base.dequantize(torch.float32)
        assert torch.equal(stored.weight(key).dequantize(torch.float32), expected)


def test_an_adapter_for_another_model(tiny_adapter: Path, tmp_path: Path) -> None:
    file = read_adapter(tiny_adapter)
    with pytest.raises(CheckpointError, match="not a linear of this base"):
        StoredBase(make_model(tmp_path / "shallow", num_hidden_layers=1)).adapted_keys(file)
    with pytest.raises(CheckpointError, match=r"is 128×192 here and 64×192"):
        StoredBase(make_model(tmp_path / "wide", hidden_size=128)).adapted_keys(file)
