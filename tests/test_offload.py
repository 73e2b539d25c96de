"""What waits on the host comes back unchanged, and nothing else goes there."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import qdora
from qdora.inject import decoder_layers
from qdora.offload import HostEmbedding, HostInputs
from tests.conftest import disturb, make_model

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = torch.arange(48).view(2, 24)


def gradients(model: Any, host_inputs: bool) -> tuple[float, list[torch.Tensor]]:
    disturb(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if host_inputs:
        HostInputs(model.device).install(model)
    ids = IDS.to(model.device)
    total = 0.0
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def load(path: Path, device: str, **how: Any) -> Any:
    torch.manual_seed(0)
    return qdora.load_model(path, adapter=qdora.AdapterConfig(rank=4, alpha=8, dropout=0.1), device=device, **how)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_on_the_host_change_no_bit(device: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", num_hidden_layers=5)
    here, there = gradients(load(path, device), False), gradients(load(path, device), True)
    assert here[0] == there[0]
    assert len(here[1]) == len(there[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(here[1], there[1], strict=True))


def test_one_tensor_a_layer_is_parked_and_its_original_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(make_model(tmp_path / "model", num_hidden_layers=5), "cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shapes, originals = [], []
    park = HostInputs._park

    def watched(self: HostInputs, tensor: torch.Tensor) -> Any:
        shapes.append(tuple(tensor.shape))
        originals.append(weakref.ref(tensor.untyped_storage()))
        return park(self, tensor)

    monkeypatch.setattr(HostInputs, "_park", watched)
    inputs = HostInputs(model.device)
    inputs.install(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert shapes == [(2, 24, 64)] * len(decoder_layers(model))
    # autograd holds on to a leaf whatever is packed for it: the embedding's output, the first layer's input
    assert [ref() is None for ref in originals] == [False, True, True, True, True]
    loss.backward()
    assert len(shapes) == 5
    del loss
    assert all(ref() is None for ref in inputs._waiting), "nothing stays on the host after the step"


class Streams:
    """The calls to a device's streams, in their order, where there is no such device."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.Event = lambda: SimpleNamespace(record=lambda stream: self.calls.append(("record", stream)))

    def current_stream(self, _: Any) -> Any:
        return SimpleNamespace(wait_event=lambda event: self.calls.append(("wait", event)))

    def stream(self, _: Any) -> Any:
        return nullcontext()


def test_the_arithmetic_waits_for_the_copies_before_the_last_two(tmp_path: Path) -> None:
    """So no more than that many layers' inputs are on the device, however far ahead the host is."""
    path = make_model(tmp_path / "model", num_hidden_layers=5)
    model = load(path, "cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs, streams = HostInputs(model.device), Streams()
    inputs._module, inputs._pins = streams, False
    inputs._stream = SimpleNamespace(wait_stream=lambda _: None)
    inputs.install(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert [call for call, _ in streams.calls] == [*["record"] * 3, "wait", "record", "wait", "record", "wait"]
    assert len(inputs._under_way) == 2
    streams.calls.clear()
    loss.backward()
    # The last is fetched and all is waited for, then the next one is fetched ahead of its use, and waited for then.
    assert [call for call, _ in streams.calls] == ["record", *["wait"] * 3, *["record", "wait"] * 4]
    assert not inputs._under_way
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_layer_that_changes_its_input_is_refused(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model"), "cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    HostInputs(model.device).install(model)

    def change(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[0].mul_(2)

    decoder_layers(model)[-1].input_layernorm.register_forward_hook(change)
    with pytest.raises(qdora.ConfigError, match="changes its input in place; leave activation_offloading out"):
        model(input_ids=IDS, labels=IDS)


def test_a_forward_that_never_comes_back_leaves_nothing(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model", num_hidden_layers=3), "cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    HostInputs(model.device).install(model)
    model(input_ids=IDS, labels=IDS)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_embedding_on_the_host(device: str, stream: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", tie=False)
    resident = load(path, device)
    model = load(path, device, embedding_on_host=True, stream_base=stream)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert embedding.weight.device.type == "cpu"
    ids = IDS.to(device)
    assert torch.equal(model.eval()(input_ids=ids).logits, resident.eval()(input_ids=ids).logits)
    model.to(device)
    assert embedding.weight.device.type == "cpu"
    assert gradients(model, True)[0] == gradients(resident, False)[0]


class Shifted(nn.Embedding):
    """Of a stranger."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


@pytest.mark.parametrize("kind", ["plain", "scaled", "of a stranger", "trained", "hooked"])
def test_rows_for_an_accelerator_are_looked_up_in_pinned_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without one, so that pinned memory is memory like any other."""
    asked: list[bool] = []

    def unpinned(make: Any) -> Any:
        def empty(*arguments: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
            asked.append(pin_memory)
            made: torch.Tensor = make(*arguments, **how)
            return made

        return empty

    embedding: Any = {"scaled": partial(Gemma3TextScaledWordEmbedding, padding_idx=0, embed_scale=3.0)}.get(
        kind, Shifted if kind == "of a stranger" else nn.Embedding
    )(50, 8)
    embedding.requires_grad_(kind == "trained")
    if kind == "hooked":
        embedding.register_forward_hook(lambda _, inputs, output: output * 2)
    expected = embedding(IDS)
    host = HostEmbedding(embedding, torch.device("cpu"))
    assert not host._pins
    assert torch.equal(host(IDS), expected)
    host._pins = True
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unpinned(torch.empty))
        patch.setattr(torch, "empty_like", unpinned(torch.empty_like))
        found = host(IDS)
    assert asked == [True]
    assert torch.equal(found, expected)
    assert found.requires_grad == (kind == "trained")
    if kind == "trained":
        found.sum().backward()
        assert embedding.weight.grad.sum() == IDS.numel() * 8


def test_an_embedding_that_is_the_head_must_be_on_the_device(tiny_nf4: Path) -> None:
    with pytest.raises(qdora.ConfigError, match="is the output head's weight"):
        qdora.load_model(tiny_nf4, device="cpu", embedding_on_host=True)
