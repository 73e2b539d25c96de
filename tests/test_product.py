"""What the product's nodes keep, free and compute twice; its numbers are held against fp64 in `test_dora`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qdora
from qdora import ConfigError
from qdora.dora import DoRALinear
from qdora.inject import adapted_linears, hold_outputs
from tests.families import make_family
from tests.test_dora import make_layer


class Block(nn.Module):
    """Two adapted linears, as the first and the last of a decoder layer."""

    def __init__(self, use_dora: bool = True, hold: bool = False, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first = make_layer("nf4", 128, 128, use_dora=use_dora)
        self.second = make_layer("nf4", 128, 128, use_dora=use_dora)
        self.last = nn.Identity() if last is None else last
        hold_outputs(self, hold)
        self.products = [self._count(linear) for linear in (self.first, self.second)]
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)

    @staticmethod
    def _count(linear: DoRALinear) -> list[int]:
        """Let each product of a base weight lengthen a list."""
        products: list[int] = []
        computed = linear.base.linear

        def counted(x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
            products.append(1)
            return computed(x_TI, row_scale_O)

        linear.base.linear = counted
        return products

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))

    def step(self, micro_batches: int = 1, together: bool = False) -> list[int]:
        """One optimizer step under checkpointing; how often each linear's product was computed."""
        for products in self.products:
            products.clear()
        torch.manual_seed(0)
        losses = []
        for _ in range(micro_batches):
            loss = checkpoint(self, torch.randn(7, 128, requires_grad=True), use_reentrant=False).square().sum()
            losses.append(loss)
            if not together:
                loss.backward()
        if together:
            sum(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [len(products) for products in self.products]


def test_the_last_product_of_lora_is_not_computed_twice() -> None:
    assert Block(use_dora=False).step() == [2, 1]


def test_the_last_product_of_dora_is_held_from_the_second_step_on() -> None:
    block = Block(hold=True)
    assert [block.step(2) for _ in range(3)] == [[4, 4], [4, 2], [4, 2]]
    hold_outputs(block, False)
    assert block.step() == [2, 2]
    assert Block().step() == [2, 2]


def test_it_is_not_held_where_something_else_waits_for_it() -> None:
    block = Block(hold=True, last=nn.LayerNorm(128))
    assert [block.step() for _ in range(3)] == [[2, 2]] * 3


@pytest.mark.parametrize("together", [False, True], ids=["in turn", "several forwards before a backward"])
def test_holding_changes_no_bit(together: bool) -> None:
    blocks = [Block(hold=hold) for hold in (False, True)]
    for block in blocks:
        for _ in range(3):
            block.step(3, together)
    plain, held = (block.state_dict() for block in blocks)
    assert all(torch.equal(value, held[name]) for name, value in plain.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_only_a_recompute_that_stops_early_is_learned_from(use_reentrant: bool) -> None:
    block = Block(hold=True)
    for _ in range(2):
        checkpoint(block, torch.randn(7, 128, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
        block.optimizer.step()
    assert block.second._holds() is not use_reentrant
    assert not block.first._holds()


@pytest.mark.parametrize(
    ("family", "targets", "holds"),
    [
        ("mistral", "all-linear", "mlp.down_proj"),
        ("phi", "all-linear", "mlp.fc2"),
        ("gpt2", "all-linear", None),  # a dropout follows, and keeps its mask
        ("gemma2", "all-linear", None),  # a norm follows
        ("mistral", ("q_proj", "v_proj"), None),
        ("mixtral", r".*experts.*|.*q_proj", None),  # the sum over a token's experts waits for all of them
    ],
)
def test_the_models_that_there_are(family: str, targets: Any, holds: str | None, tmp_path: Path) -> None:
    path = make_family(family, tmp_path / "model")
    adapter = qdora.AdapterConfig(rank=2, alpha=4, target_modules=targets)
    trained = [three_steps(path, adapter, hold) for hold in (False, True)]
    assert all(torch.equal(value, trained[1][0][name]) for name, value in trained[0][0].items())
    assert trained[1][1] == ({holds} if holds else set())
    assert trained[0][1] == set()


def three_steps(path: Path, adapter: qdora.AdapterConfig, hold: bool) -> tuple[dict[str, Tensor], set[str]]:
    """What three steps train, and the names within a layer of the linears that hold their outputs in the last."""
    torch.manual_seed(0)
    model = qdora.load_model(path, adapter=adapter, device="cpu").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hold_outputs(model, hold)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 100, (2, 24))
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        holding = {name for name, layer in adapted_linears(model).items() if layer._holds()}
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained, {".".join(name.split(".")[-2:]) for name in holding}


def plain_call(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return run(x)


def checkpointed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = checkpoint(run, x, use_reentrant=False)
    return result


@pytest.mark.parametrize(("hold", "call"), [(False, checkpointed), (True, plain_call), (True, checkpointed)])
def test_an_output_that_is_changed_in_place_is_an_error(hold: bool, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("nf4")
    monkeypatch.setattr(layer, "_holds", lambda: hold)

    def changes(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        y += 1
        return y * y

    with pytest.raises(ConfigError, match="changes the output of an adapted linear in place"):
        call(changes, torch.randn(9, 128)).sum().backward()


def test_a_held_output_is_freed_by_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("nf4")
    monkeypatch.setattr(layer, "_holds", lambda: True)
    loss = layer(torch.randn(9, 128)).sum()
    node = loss.grad_fn.next_functions[0][0].next_functions[0][0]
    assert node.held.shape == (9, 96)
    loss.backward(retain_graph=True)
    assert node.held is None
    with pytest.raises(RuntimeError, match="a second backward through a linear that holds its output"):
        loss.backward()


def test_the_output_is_freed_before_the_gradient_of_the_input_is_made() -> None:
    layer = make_layer("nf4")
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        if copy.shape == (9, 96):
            kept.append(weakref.ref(copy))
        return copy

    alive: list[bool] = []
    transposed = layer.base.linear_transposed

    def watched(g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        alive.extend(reference() is not None for reference in kept)
        return transposed(g_TO, row_scale_O)

    layer.base.linear_transposed = watched
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(9, 128, requires_grad=True))
    assert [reference() is not None for reference in kept] == [True]
    y.sum().backward()
    assert alive == [False]


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ((), {(9, 128), (9, 8), (8, 128), (96, 8), (9, 96)}),
        (("magnitude_offset",), {(9, 128), (9, 8), (8, 128), (96, 8)}),
        (("lora_A",), {(9, 8), (8, 128), (96, 8), (9, 96)}),
        (("lora_B",), {(9, 128), (8, 128), (96, 8), (9, 96)}),
    ],
)
def test_nothing_is_kept_for_what_is_frozen(frozen: tuple[str, ...], kept: set[tuple[int, ...]]) -> None:
    layer = make_layer("nf4")
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(9, 128, requires_grad=True))
    assert shapes == kept
