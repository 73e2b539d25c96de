"""What the product's nodes keep, free and compute twice; its numbers are held against fp64 in `test_dora`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from qdora import ConfigError
from qdora.dora import DoRALinear
from qdora.product import column_dots
from tests.memory import allocated_by
from tests.test_dora import make_layer


class Block(nn.Module):
    """Two adapted linears, as the first and the last of a decoder layer."""

    def __init__(self, use_dora: bool = True, hold: bool = False, last: nn.Module | None = None) -> None:
        super().__init__()
        self.first = make_layer("nf4", 128, 128, use_dora=use_dora)
        self.second = make_layer("nf4", 128, 128, use_dora=use_dora)
        self.last = nn.Identity() if last is None else last
        self.second.hold_output = hold
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


def test_the_last_product_of_dora_is_computed_twice_unless_it_is_held() -> None:
    assert Block().step(3) == [6, 6]
    assert Block(hold=True).step(3) == [6, 3]
    assert Block(hold=True, last=nn.LayerNorm(128)).step() == [2, 2]  # which waits for it


@pytest.mark.parametrize("together", [False, True], ids=["in turn", "several forwards before a backward"])
def test_holding_changes_no_bit(together: bool) -> None:
    blocks = [Block(hold=hold) for hold in (False, True)]
    for block in blocks:
        for _ in range(3):
            block.step(3, together)
    plain, held = (block.state_dict() for block in blocks)
    assert all(torch.equal(value, held[name]) for name, value in plain.items())


def plain_call(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return run(x)


def checkpointed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = checkpoint(run, x, use_reentrant=False)
    return result


@pytest.mark.parametrize(("hold", "call"), [(False, checkpointed), (True, plain_call), (True, checkpointed)])
def test_an_output_that_is_changed_in_place_is_an_error(hold: bool, call: Any) -> None:
    layer = make_layer("nf4")
    layer.hold_output = hold
    advice = "leave --hold_outputs out" if hold else "leave that linear out of the targets, or train LoRA"

    def changes(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        y += 1
        return y * y

    with pytest.raises(ConfigError, match=f"changes the output .* in place, .*; {advice}$"):
        call(changes, torch.randn(9, 128)).sum().backward()


@pytest.mark.parametrize("hold", [False, True])
def test_nothing_is_kept_where_no_gradient_will_be_asked_for(hold: bool) -> None:
    layer, x = make_layer("nf4", 128, 128), torch.randn(7, 128)
    layer.hold_output = hold
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.clone()), expected)


def test_a_held_output_is_freed_by_its_backward() -> None:
    layer = make_layer("nf4")
    layer.hold_output = True
    loss = layer(torch.randn(9, 128)).sum()
    node = loss.grad_fn.next_functions[0][0].next_functions[0][0]
    assert node.held.shape == (9, 96)
    layer.hold_output = False
    assert layer(torch.randn(9, 128)).grad_fn.next_functions[0][0].held is None
    loss.backward(retain_graph=True)
    assert node.held is None
    with pytest.raises(
        RuntimeError, match=r"^a second backward through a linear that holds its output; leave hold_output out$"
    ):
        loss.backward()


def test_a_thinned_input_s_gradient_is_made_only_if_it_is_wanted() -> None:
    layer = make_layer("nf4", dropout=0.5)

    def flops(wanted: bool) -> int:
        y = layer(torch.randn(10, 128, requires_grad=wanted))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return int(counter.get_total_flops())

    assert flops(True) - flops(False) == 2 * 10 * 96 * 128 + 2 * 10 * 8 * 128


def test_a_recomputed_output_is_freed_before_the_gradient_of_the_input_is_made() -> None:
    layer = make_layer("nf4")
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    product, transposed = layer.base.linear, layer.base.linear_transposed

    def made_here(x_TI: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        y_TO: Tensor = product(x_TI, row_scale_O)
        made.append(weakref.ref(y_TO.untyped_storage()))
        return y_TO

    def watched(g_TO: Tensor, row_scale_O: Tensor | None = None) -> Tensor:
        alive.append(made[-1]() is not None)
        return transposed(g_TO, row_scale_O)

    layer.base.linear, layer.base.linear_transposed = made_here, watched
    checkpointed(lambda x: torch.tanh(layer(x)), torch.randn(9, 128, requires_grad=True)).sum().backward()
    assert len(made) == 2
    assert alive == [False]


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_between_a_forward_and_its_backward_is_an_error(name: str) -> None:
    layer = make_layer("nf4")
    loss = layer(torch.randn(9, 128)).sum()
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match=r"^an adapter was changed in place between a forward and its backward;"):
        loss.backward()


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ((), {(9, 128), (9, 8), (9, 96)}),
        (("magnitude_offset",), {(9, 128), (9, 8)}),
        (("lora_A",), {(9, 8), (9, 96)}),
        (("lora_B",), {(9, 128), (9, 96)}),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 3, 513])
@pytest.mark.parametrize("how", ["as they are", "one value", "transposed"])
def test_the_magnitude_s_sums_are_fp32_whatever_is_summed(dtype: torch.dtype, tokens: int, how: str) -> None:
    g, y, scale = torch.randn(tokens, 40).to(dtype), torch.randn(tokens, 40).to(dtype), torch.randn(40)
    scale[3] = 0
    if how == "one value":
        g = torch.ones((), dtype=dtype).expand(tokens, 40)
    if how == "transposed":
        g, y = torch.randn(2, 40, tokens).to(dtype).mT
    truth = (g.double() * y.double()).sum(dim=0) * scale
    found = column_dots(g, y, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_products_beyond_fp16_are_summed() -> None:
    rows = torch.full((3, 2), 300.0, dtype=torch.float16)
    assert column_dots(rows, rows, torch.ones(2)).tolist() == [270000.0] * 2


def test_the_magnitude_s_sums_hold_no_products() -> None:
    a, b = torch.randn(2, 1536, 64)
    assert allocated_by(lambda: column_dots(a, b, torch.ones(64))) <= 8 * 4 * 64
