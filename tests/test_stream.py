"""A streamed base computes the same bits as a resident one, whatever is asked of it in whatever order.

On the CPU the copies are real too: the slots are memory of their own, and what a layer computes with lies there.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qdora
from qdora.inject import adapted_linears
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4
from qdora.offload import HostInputs
from qdora.optimizer import CompensatedAdamW
from qdora.stream import LayerStream, StreamedWeight, layer_bytes, pinned_pieces
from tests.conftest import disturb, make_model

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ADAPTER = qdora.AdapterConfig(rank=4, alpha=8)
IDS = torch.arange(48).view(2, 24)


@pytest.fixture(scope="module", params=[1, 2, 5])
def deep(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, as many as there are slots, and an odd number of more."""
    return make_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=request.param)


def trained(
    path: Path, checkpointing: bool, host_inputs: bool = False, **how: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of two micro-batches: the losses and the adapter."""
    torch.manual_seed(1)
    model: Any = qdora.load_model(path, adapter=ADAPTER, **how)
    disturb(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if host_inputs:
        HostInputs(model.device).install(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = CompensatedAdamW(parameters.values(), lr=1e-2)
    losses = []
    for step in range(6):
        ids = (IDS + step).to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: p.detach().cpu().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize(("checkpointing", "host_inputs"), [(True, False), (True, True), (False, False)])
def test_training_is_the_same(device: str, in_4bit: bool, checkpointing: bool, host_inputs: bool, deep: Path) -> None:
    resident = trained(deep, checkpointing, device=device, load_in_4bit=in_4bit)
    streamed = trained(deep, checkpointing, host_inputs, device=device, load_in_4bit=in_4bit, stream_base=True)
    assert streamed[0] == resident[0]
    assert len(set(resident[0])) == 6
    for name, value in resident[1].items():
        assert torch.equal(value, streamed[1][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_generation_and_an_adapter_of_some_linears(device: str, deep: Path, tmp_path: Path) -> None:
    some = qdora.AdapterConfig(rank=2, alpha=4, target_modules=("q_proj", "down_proj"))
    resident = qdora.load_model(deep, adapter=some, device=device).eval()
    disturb(resident)
    qdora.save_adapter(resident, tmp_path / "adapter")
    streamed = qdora.load_model(deep, adapter=tmp_path / "adapter", device=device, stream_base=True).eval()
    ids = IDS.to(device)
    answers = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (resident, streamed)]
    assert torch.equal(*answers)
    qdora.save_adapter(streamed, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_two_layers_are_on_the_device_and_they_are_copies(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, device="cpu", stream_base=True)
    weights = [module for module in model.modules() if isinstance(module, StreamedWeight)]
    assert len(weights) == 14
    (stream,) = {weight.stream for weight in weights}
    layers = [[weight.weight for weight in weights if weight.layer == number] for number in (0, 1)]
    assert [slot.numel() for slot in stream.slots] == [max(map(layer_bytes, layers))] * 2
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    for weight in weights:
        for tensor in [*weight.parameters(), *weight.buffers()]:
            assert tensor.untyped_storage().data_ptr() in slots
    sources = {source.untyped_storage().data_ptr() for copies in stream._copies for source, _ in copies}
    assert not sources & slots


def test_any_order(tiny: Path) -> None:
    """Each weight is asked on its own, up, down and at random: it answers with its own bytes."""
    resident = adapted_linears(qdora.load_model(tiny, adapter=ADAPTER, device="cpu"))
    streamed = adapted_linears(qdora.load_model(tiny, adapter=ADAPTER, device="cpu", stream_base=True))
    paths = list(resident)
    order = torch.randint(0, len(paths), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for path in [*paths, *reversed(paths), *(paths[index] for index in order)]:
        assert torch.equal(resident[path].base.dequantize(), streamed[path].base.dequantize()), path
        ours, theirs = streamed[path].base, resident[path].base
        assert torch.equal(ours.row_norms_squared(), theirs.row_norms_squared())


def test_each_layer_is_fetched_once_a_pass_and_ahead_of_its_use() -> None:
    torch.manual_seed(0)
    layers = [nn.ModuleList([NF4Weight.from_tensors(quantize_nf4(torch.randn(64, 64)))]) for _ in range(4)]
    stream = LayerStream(layers, torch.device("cpu"), pin=False)
    number_of = {id(copies): number for number, copies in enumerate(stream._copies)}
    copy = stream._copier.copy
    fetched: list[int] = []

    def watched(copies: Any, slot: int) -> None:
        fetched.append(number_of[id(copies)])
        copy(copies, slot)

    stream._copier.copy = watched  # type: ignore[method-assign]

    def walk(*order: int) -> list[list[int]]:
        """What is fetched as each layer is asked for."""
        found = []
        for index in order:
            stream.require(index)
            found.append(list(fetched))
            fetched.clear()
        return found

    assert walk(0, 0, 1, 2, 3) == [[0, 1], [], [2], [3], []]
    assert walk(3, 2, 1, 0) == [[], [1], [0], []]
    assert walk(0, 1, 2, 3) == [[], [2], [3], []]
    assert walk(0) == [[0, 1]]


def test_pinned_pieces_are_powers_of_two_and_give_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last: torch gives pinned memory so, and would give 268 MB for a layer of 141."""
    sizes = [piece.stop - piece.start for piece in pinned_pieces(140_600_000)]
    assert sum(sizes) == 140_600_000
    assert all(size.bit_count() == 1 for size in sizes[:-1])
    assert sizes[-1] <= 2**20
    assert pinned_pieces(0) == []
    # There may be nothing here to pin it for.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr("qdora.stream._SMALLEST_PIECE", 256)
    torch.manual_seed(0)
    layers = [nn.ModuleList([NF4Weight.from_tensors(quantize_nf4(torch.randn(230, 64)))]) for _ in range(3)]
    weights = [layer[0].dequantize() for layer in layers]
    stream = LayerStream(layers, torch.device("cpu"), pin=True)
    assert len(stream._copies[0]) > 1
    for number in (0, 1, 2, 1, 0):
        stream.require(number)
        assert torch.equal(layers[number][0].dequantize(), weights[number])


def test_an_interrupted_fetch_is_done_again() -> None:
    """From layer 2 to 0, which have one slot, with Ctrl-C half way; then whichever comes next has its own bytes."""
    torch.manual_seed(0)
    layers = [nn.ModuleList([NF4Weight.from_tensors(quantize_nf4(torch.randn(64, 64)))]) for _ in range(3)]
    for then in (2, 0):
        stream = LayerStream(deepcopy(layers), torch.device("cpu"), pin=False)
        stream.require(2)
        copy = stream._copier.copy

        def half(copies: Any, slot: int, copy: Any = copy) -> None:
            copy(copies[:1], slot)
            raise KeyboardInterrupt

        stream._copier.copy = half  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            stream.require(0)
        stream._copier.copy = copy  # type: ignore[method-assign]
        stream.require(then)
        assert all(torch.equal(source, window) for source, window in stream._copies[then])


def test_a_streamed_model_is_not_copied_and_keeps_its_weights(tiny_nf4: Path) -> None:
    """The windows of a copy would show nothing, and what is loaded into a slot is lost with the next layer."""
    resident, streamed = (qdora.load_model(tiny_nf4, ADAPTER, device="cpu", stream_base=on) for on in (False, True))
    with pytest.raises(qdora.ConfigError, match=r"cannot be copied.*qdora.reference_model"):
        deepcopy(streamed)
    state = {key.replace(".base.weight.", ".base."): value for key, value in streamed.state_dict().items()}
    expected = resident.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, state[key]) for key, value in expected.items() if ".base." in key)
    streamed.load_state_dict(streamed.state_dict())
    other = streamed.state_dict()
    key = next(key for key in other if key.endswith(".packed"))
    other[key] = other[key] ^ 1
    with pytest.raises(qdora.ConfigError, match="other weights cannot be loaded into a base that is streamed"):
        streamed.load_state_dict(other)


def test_moving_or_casting_the_model_leaves_the_windows(tiny_nf4: Path) -> None:
    model = qdora.load_model(tiny_nf4, device="cpu", stream_base=True)
    weights = [module for module in model.modules() if isinstance(module, StreamedWeight)]
    before = [weight.dequantize() for weight in weights]
    model.to(torch.float16).to("cpu").half()
    assert all(torch.equal(weight.dequantize(), value) for weight, value in zip(weights, before, strict=True))
