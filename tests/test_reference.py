"""The reference is the base's function, costs no second copy, and leaves the model that is trained as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qdora
from qdora import AdapterConfig, ConfigError
from tests.conftest import disturb, make_model

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def trained(tiny_nf4: Path) -> Any:
    model = qdora.load_model(tiny_nf4, adapter=AdapterConfig(rank=4, alpha=8, dropout=0.5)).train()
    disturb(model)
    return model


def test_its_logits_are_the_base_s(trained: Any, tiny_nf4: Path) -> None:
    base = qdora.load_model(tiny_nf4)(IDS).logits
    reference = qdora.reference_model(trained)
    found = reference(IDS).logits
    assert torch.equal(found, base)
    assert not found.requires_grad
    hidden = reference.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(reference.get_output_embeddings()(hidden), base)
    assert reference.config is trained.config
    assert not torch.equal(trained(IDS).logits, base)


def test_its_head_is_the_base_s_where_a_copy_is_trained(tmp_path: Path) -> None:
    directory = make_model(tmp_path, tie=False)
    base = qdora.load_model(directory)(IDS).logits
    model = qdora.load_model(directory, adapter=AdapterConfig(rank=4, modules_to_save=("lm_head",)))
    disturb(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    reference = qdora.reference_model(model)
    hidden = reference.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(reference.get_output_embeddings()(hidden), base)
    assert torch.equal(reference(IDS).logits, base)


def test_no_second_copy_of_any_weight(trained: Any) -> None:
    reference = qdora.reference_model(trained)
    own = {tensor.data_ptr() for tensor in [*trained.parameters(), *trained.buffers()]}
    held = [tensor.data_ptr() for tensor in [*reference.parameters(), *reference.buffers()]]
    assert set(held) == own
    assert len(list(reference.parameters())) == len(list(trained.parameters()))


def test_the_model_trains_on_as_before(trained: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        trained(IDS, labels=IDS).loss.backward()
        found = [p.grad for p in trained.parameters() if p.grad is not None]
        trained.zero_grad()
        return found

    trained.model.layers[0].eval()
    before = gradients()
    modes = {name: module.training for name, module in trained.named_modules()}
    reference = qdora.reference_model(trained)
    reference.eval()
    reference(IDS)
    assert {name: module.training for name, module in trained.named_modules()} == modes
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_a_failure_within_leaves_the_adapters_on(trained: Any) -> None:
    before = trained.eval()(IDS).logits
    with pytest.raises(ValueError, match="input_ids"):
        qdora.reference_model(trained.train())(IDS, inputs_embeds=torch.zeros(1))
    assert trained.training
    assert torch.equal(trained.eval()(IDS).logits, before)


def test_a_model_without_adapters(tiny_nf4: Path) -> None:
    with pytest.raises(ConfigError, match="is its own reference"):
        qdora.reference_model(qdora.load_model(tiny_nf4))
