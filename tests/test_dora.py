"""`DoRALinear` against the equation in fp64: the output and every gradient, over bases, shapes and dtypes.

Error budgets, as ‖ours − truth‖ / ‖truth‖. fp32: 2e-5. bf16: the truth is computed from the very values the layer
sees, so what is left is the arithmetic's own rounding (2⁻⁹ for each result, a few of them in a chain): 1.5e-2.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from qdora.base import BaseWeight
from qdora.dense import DenseWeight
from qdora.dora import DoRALinear, FrozenLinear
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4
from qdora.optimizer import CompensatedAdamW
from qdora.product import column_dots
from qdora.workspace import Workspace, assume
from tests.reference import dora as reference

BUDGET = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


def make_base(kind: str, weight: Tensor, dtype: torch.dtype) -> BaseWeight:
    return NF4Weight.from_tensors(quantize_nf4(weight)) if kind == "nf4" else DenseWeight(weight.to(dtype))


def make_layer(
    kind: str = "nf4",
    out_features: int = 96,
    in_features: int = 128,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    use_dora: bool = True,
    zero_rows: bool = False,
    trained: bool = True,
    dropout: float = 0.0,
) -> DoRALinear:
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * 0.05
    if zero_rows:
        weight[::7] = 0
    layer = DoRALinear(
        make_base(kind, weight, dtype),
        rank,
        scaling=2.0,
        bias=torch.randn(out_features).to(dtype) if bias else None,
        use_dora=use_dora,
        dropout=dropout,
        dtype=dtype,
    )
    if trained:
        with torch.no_grad():
            layer.lora_B.normal_(std=0.05)
            if layer.magnitude_offset is not None:
                layer.magnitude_offset.normal_(std=0.1)
    return layer


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def truth_of(layer: DoRALinear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    W, A, B = (t.detach().double() for t in (layer.base.dequantize(torch.float32), layer.lora_A, layer.lora_B))
    A.requires_grad_()
    B.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    m = None
    if layer.magnitude_offset is not None:
        m = (W.norm(dim=1) + layer.magnitude_offset.detach().double()).requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    y = reference.forward(x64, W, A, B, m, layer.scaling, bias)
    y.backward(g.double())
    truth = {"y": y.detach(), "x": x64.grad, "A": A.grad, "B": B.grad}
    return truth if m is None else {**truth, "magnitude": m.grad}


def ours_of(layer: DoRALinear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    ours = {"y": y.detach(), "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    return ours if layer.magnitude_offset is None else {**ours, "magnitude": layer.magnitude_offset.grad}


def check(layer: DoRALinear, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(tokens, layer.in_features).to(dtype)
    g = torch.randn(tokens, layer.out_features).to(dtype)
    ours, truth = ours_of(layer, x, g), truth_of(layer, x, g)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.isfinite(ours[name]).all(), name
        assert relative_error(ours[name], value) <= BUDGET[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("zero_rows", [False, True], ids=["", "zero_rows"])
def test_forward_and_gradients_match_fp64(
    kind: str, use_dora: bool, dtype: torch.dtype, bias: bool, zero_rows: bool
) -> None:
    layer = make_layer(kind, dtype=dtype, bias=bias, use_dora=use_dora, zero_rows=zero_rows)
    check(layer, 33, dtype)


@pytest.mark.parametrize("rank", [1, 2, 16, 64])
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("in_features", [64, 72, 100, 33, 192])
def test_shapes(rank: int, tokens: int, in_features: int) -> None:
    for kind, dtype in itertools.product(["nf4", "dense"], [torch.float32, torch.bfloat16]):
        check(make_layer(kind, 50, in_features, rank, dtype), tokens, dtype)


@pytest.mark.parametrize("in_features", [128, 100])
def test_many_tiles_match_fp64(in_features: int) -> None:
    with assume(Workspace(tile_bytes=4 * in_features * 16)):
        for dtype in (torch.float32, torch.bfloat16):
            check(make_layer("nf4", 70, in_features, dtype=dtype), 40, dtype)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype=dtype, trained=False, zero_rows=True)
    x = torch.randn(7, layer.in_features).to(dtype)
    assert torch.equal(layer(x), FrozenLinear(layer.base)(x))
    layer.enabled = False
    assert torch.equal(layer(x), FrozenLinear(layer.base)(x))


def test_frozen_linear_matches_fp64() -> None:
    layer = make_layer("nf4")
    frozen = FrozenLinear(layer.base, torch.randn(96))
    x = torch.randn(2, 5, 128, requires_grad=True)
    g = torch.randn(2, 5, 96)
    y = frozen(x)
    y.backward(g)
    W = layer.base.dequantize().double()
    assert relative_error(y, x.double() @ W.t() + frozen.bias.double()) < 2e-5
    assert relative_error(x.grad, g.double() @ W) < 2e-5


def test_a_zero_magnitude_keeps_exact_gradients() -> None:
    layer = make_layer("nf4")
    with torch.no_grad():
        layer.magnitude_offset[:10] = -layer.base_norm()[:10]
    assert (layer.magnitude()[:10] == 0).all()
    x, g = torch.randn(20, 128), torch.randn(20, 96)
    ours, truth = ours_of(layer, x, g), truth_of(layer, x, g)
    assert ours["y"][:, :10].abs().max() < 1e-15
    assert relative_error(ours["magnitude"][:10], truth["magnitude"][:10]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_row_can_learn(dtype: torch.dtype) -> None:
    layer = make_layer("nf4", zero_rows=True, trained=False)
    target = torch.randn(64, 96)
    x = torch.randn(64, 128).to(dtype)
    start = (layer(x) - target)[:, ::7].square().mean()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
        optimizer.step()
    assert (layer.merged_weight()[::7].norm(dim=1) > 0).all()
    assert (layer(x) - target)[:, ::7].square().mean() < 0.8 * start


def true_norm(layer: DoRALinear) -> Tensor:
    V = layer.base.dequantize().double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return V.norm(dim=1)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("in_features", [128, 100])
def test_the_factored_norm_is_the_dense_norm(kind: str, in_features: int) -> None:
    layer = make_layer(kind, in_features=in_features, zero_rows=True)
    assert relative_error(layer.weight_norm(), true_norm(layer).detach()) < 1e-6


BNB_SETTINGS = {
    **{name: {"lr": 1e-2, "min_8bit_size": 1} for name in ("AdamW8bit", "PagedAdamW8bit")},
    **{name: {"lr": 1e-3} for name in ("Lion32bit", "Lion8bit")},
    "SGD8bit": {"lr": 1e-1, "momentum": 0.9},
}


def optimizers() -> dict[str, object]:
    import bitsandbytes.optim as bnb

    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
        "compensated": lambda p: CompensatedAdamW(p, lr=1e-2),
        **{
            name: lambda p, name=name: getattr(bnb, name)(p, **BNB_SETTINGS.get(name, {"lr": 1e-2}))
            for name in (
                *("AdamW32bit", "AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit", "Lion32bit", "Lion8bit"),
                *("AdEMAMix8bit", "RMSprop8bit", "Adagrad8bit", "SGD8bit"),
            )
        },
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(optimizers()))
def test_the_norm_in_use_is_never_stale(name: str, dtype: torch.dtype) -> None:
    layer = make_layer("nf4", dtype=dtype)
    optimizer = optimizers()[name]([p for p in layer.parameters() if p.requires_grad])  # type: ignore[operator]
    x, target = torch.randn(40, 128).to(dtype), torch.randn(40, 96)
    start = true_norm(layer)
    for _ in range(20):
        for _ in range(2):  # gradient accumulation
            (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            layer(x)
        in_use = layer.magnitude() / layer.row_scale(dtype).scale
        assert relative_error(in_use.abs(), true_norm(layer)) < (1e-5 if dtype == torch.float32 else 2e-4)
    assert relative_error(true_norm(layer), start) > 1e-2


def test_the_norm_follows_edits_and_loading() -> None:
    layer, other = make_layer("nf4"), make_layer("nf4")
    x = torch.randn(3, 128)
    with torch.no_grad():
        other.lora_B.mul_(3)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.lora_B.data = layer.lora_B.data * 2  # another storage: noticed
    with torch.no_grad():
        other.lora_B.mul_(2)
    assert torch.equal(layer(x), other(x))
    layer.lora_B.data.mul_(2)  # the one write that only `refresh` catches
    layer.refresh()
    with torch.no_grad():
        other.lora_B.mul_(2)
    assert torch.equal(layer(x), other(x))


def trained_of(layer: DoRALinear) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in layer.named_parameters() if p.requires_grad]


def test_the_norm_is_that_of_what_a_functional_call_swaps_in() -> None:
    layer, x = make_layer("nf4"), torch.randn(3, 128)
    stacked = {name: torch.stack([p.detach() * s for s in (1, 20, 0.1)]) for name, p in trained_of(layer)}

    def swapped(i: int, fresh: float) -> Tensor:
        return functional_call(layer, {name: stack[i] * fresh for name, stack in stacked.items()}, (x,))

    for i in range(3):  # slices of one tensor lie in one storage
        other = make_layer("nf4")
        other.load_state_dict({name: stack[i] for name, stack in stacked.items()}, strict=False)
        given = {name: stack[i] for name, stack in stacked.items()}
        assert relative_error(functional_call(layer, given, (x,)), x @ other.merged_weight().t()) < 1e-5
    found = [swapped(0, t).detach() for t in (1.0, 8.0, 0.5, 5.0, 2.0, 3.0)]  # each lies where the last one lay
    for t, y in zip((1.0, 8.0, 0.5, 5.0, 2.0, 3.0), found, strict=True):
        other.load_state_dict({name: stack[0] * t for name, stack in stacked.items()}, strict=False)
        assert relative_error(y, other(x).detach()) < 1e-6


@pytest.mark.parametrize("use_dora", [True, False])
def test_a_layer_made_of_inference_tensors_computes(use_dora: bool) -> None:
    x = torch.randn(3, 128)
    expected = make_layer("nf4", use_dora=use_dora)(x).detach()
    with torch.inference_mode():
        layer = make_layer("nf4", use_dora=use_dora)
        assert torch.equal(layer(x), expected)
        layer.lora_B.mul_(0)  # nothing counts such an edit
        assert relative_error(layer(x), x @ layer.merged_weight().t()) < 1e-5


@pytest.mark.parametrize(("kind", "use_dora"), [("nf4", True), ("dense", False)])
def test_a_backward_within_an_autocast_that_its_forward_did_not_see(kind: str, use_dora: bool) -> None:
    layer, x = make_layer(kind, use_dora=use_dora), torch.randn(9, 128, requires_grad=True)
    frozen = FrozenLinear(layer.base)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad((layer(x) + frozen(x)).square().sum(), wanted)
    loss = (layer(x) + frozen(x)).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_norm_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("nf4")
    calls = 0
    weight_norm = layer.weight_norm

    def counted(dtype: torch.dtype) -> Tensor:
        nonlocal calls
        calls += 1
        return weight_norm(dtype)

    monkeypatch.setattr(layer, "weight_norm", counted)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    x = torch.randn(5, 128, requires_grad=True)
    for _ in range(3):
        for _ in range(4):
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        optimizer.step()
    assert calls == 3


def test_casting_the_model_leaves_the_constants_alone() -> None:
    layer = make_layer("nf4")
    before = layer.base.dequantize(), layer.base_norm()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.base.dequantize(), before[0])
    assert torch.equal(layer.base_norm(), before[1])
    assert layer.lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    layer = make_layer("nf4", dtype=torch.bfloat16)
    x = torch.randn(9, 128).bfloat16()
    g = torch.randn(9, 96).bfloat16()
    plain = ours_of(layer, x, g)
    for p in layer.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).backward(g)
    assert torch.equal(x.grad, plain["x"])
    assert torch.equal(layer.lora_A.grad, plain["A"])
    assert torch.equal(layer.magnitude_offset.grad, plain["magnitude"])


def test_autocast_computes_in_its_dtype_with_an_fp32_norm() -> None:
    layer = make_layer("nf4")
    x = torch.randn(9, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        norm = layer.magnitude() / layer.row_scale().scale
    assert y.dtype == torch.bfloat16
    assert relative_error(norm, true_norm(layer).detach()) < 1e-6
    assert relative_error(y, truth_of(layer, x, torch.zeros(9, 96))["y"]) < BUDGET[torch.bfloat16]


def test_dropout_thins_the_low_rank_path_only() -> None:
    layer = make_layer("nf4", dropout=0.999, use_dora=False)
    x = torch.randn(50, 128)
    dropped = layer(x)
    layer.eval()
    kept = layer(x)
    base = FrozenLinear(layer.base)(x)
    assert (dropped - base).abs().median() == 0
    assert relative_error(base, kept.double()) > 0.05


def test_several_forwards_before_a_backward() -> None:
    layer = make_layer("nf4")
    x1, x2 = torch.randn(4, 128), torch.randn(6, 128)
    (layer(x1).sum() + layer(x2).sum()).backward()
    together = layer.lora_A.grad.clone(), layer.magnitude_offset.grad.clone()
    layer.zero_grad()
    layer(x1).sum().backward()
    layer(x2).sum().backward()
    assert torch.allclose(together[0], layer.lora_A.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(together[1], layer.magnitude_offset.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_dropout_s_gradients_match_fp64(kind: str) -> None:
    layer = make_layer(kind, dropout=0.5)
    x, g = torch.randn(9, 128, requires_grad=True), torch.randn(9, 96)
    torch.manual_seed(1)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5).double()
    torch.manual_seed(1)
    y = layer(x)
    y.backward(g)
    W, A, B = (t.detach().double() for t in (layer.base.dequantize(), layer.lora_A, layer.lora_B))
    x64, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    m = layer.magnitude().double().requires_grad_()
    norm = (W + layer.scaling * B @ A).norm(dim=1).detach()
    truth = m / norm * (x64 @ W.t() + layer.scaling * (x64 * mask) @ A.t() @ B.t())
    truth.backward(g.double())
    for ours, expected in [
        (y, truth),
        (x.grad, x64.grad),
        (layer.lora_A.grad, A.grad),
        (layer.lora_B.grad, B.grad),
        (layer.magnitude_offset.grad, m.grad),
    ]:
        assert relative_error(ours.detach(), expected.detach()) < BUDGET[torch.float32]


def test_torch_compile_steps_around_the_layer() -> None:
    """Compiled, the norm would be guarded by the number of optimizer steps, and so compiled again after each."""
    torch._dynamo.reset()
    layer, other = make_layer("nf4"), make_layer("nf4")
    plain, compiled = (torch.nn.Sequential(torch.nn.SiLU(), each, torch.nn.SiLU()) for each in (layer, other))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (layer, other)]
    compiled = torch.compile(compiled, backend="aot_eager")
    x, g = torch.randn(9, 128), torch.randn(9, 96)
    torch._dynamo.utils.counters.clear()
    for _ in range(12):
        expected, ours = plain(x), compiled(x)
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)
        expected.backward(g)
        ours.backward(g)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def train_on_a_share(rank: int, directory: str) -> None:
    """One of two processes: half of the batch, gradients averaged by DDP, three steps."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    layer = torch.nn.parallel.DistributedDataParallel(Checkpointed(make_layer("nf4")))
    train(layer, slice(4 * rank, 4 * rank + 4))
    torch.save(dict(layer.module.named_parameters()), f"{directory}/{rank}.pt")
    torch.distributed.barrier()
    # Not destroy_process_group: DDP's destructor may hold the GIL while it waits for a thread of gloo that wants it.
    os._exit(0)


class Checkpointed(torch.nn.Module):
    def __init__(self, layer: DoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


def train(layer: torch.nn.Module, share: slice) -> None:
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        x, target = torch.randn(8, 128, generator=generator), torch.randn(8, 96, generator=generator)
        (layer(x[share]) - target[share]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_a_share, (str(tmp_path),), nprocs=2)
    alone = Checkpointed(make_layer("nf4"))
    train(alone, slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in alone.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].float(), value.float(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("use_dora", [True, False])
def test_the_merged_weight_is_the_equation_s(use_dora: bool) -> None:
    layer = make_layer("nf4", use_dora=use_dora, zero_rows=True)
    with torch.no_grad():
        layer.lora_B[::7] = 0
    W, A, B = (t.detach().double() for t in (layer.base.dequantize(), layer.lora_A, layer.lora_B))
    m = layer.magnitude().double() if use_dora else None
    merged = layer.merged_weight()
    assert merged.dtype == torch.float32
    assert relative_error(merged, reference.forward(torch.eye(128).double(), W, A, B, m, 2.0).t()) < 2e-6
    assert (merged[::7] == 0).all()
    assert torch.equal(layer.merged_weight(torch.float16), merged.half())


def test_only_the_adapter_is_trained() -> None:
    layer = make_layer("nf4", bias=True)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude_offset"}
    assert not any(parameter.requires_grad for parameter in FrozenLinear(layer.base, layer.bias).parameters())
    assert layer.state_dict().keys() == trained | {"bias", "base.packed", "base.absmax"}


def test_a_fresh_direction_is_lora_s() -> None:
    layer = make_layer("nf4", trained=False)
    bound = 1 / 128**0.5
    assert 0.95 * bound < layer.lora_A.abs().max() <= bound
    assert (layer.lora_B == 0).all()


def test_the_row_scale_is_kept_until_something_changes() -> None:
    layer, shard = make_layer("nf4"), torch.zeros(3)
    layer.watch([shard])
    kept = layer.row_scale()
    assert layer.row_scale(torch.float32) is kept
    shard.add_(1)
    after_an_edit = layer.row_scale()
    assert after_an_edit is not kept
    assert layer.row_scale(torch.bfloat16) is not after_an_edit
    assert make_layer("nf4", use_dora=False).row_scale() is None


def test_frozen_and_switched_off_follow_autocast() -> None:
    layer = make_layer("nf4", bias=True)
    frozen = FrozenLinear(layer.base, layer.bias)
    layer.enabled = False
    x = torch.randn(9, 128, requires_grad=True)
    for module in (frozen, layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, frozen(x).detach().double()) < BUDGET[torch.bfloat16]


def test_a_bias_takes_the_output_s_dtype() -> None:
    layer = make_layer("nf4", bias=True)
    assert layer(torch.randn(3, 128).bfloat16()).dtype == torch.bfloat16


def test_a_direction_that_cancels_the_weight_has_norm_zero_not_nan() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(96, 1), torch.randn(1, 128)
    layer = DoRALinear(DenseWeight(u @ v), rank=1, scaling=2.0, dtype=torch.float32)
    with torch.no_grad():
        layer.lora_A.copy_(v)
        layer.lora_B.copy_(u / -2)
    assert (layer.weight_norm() < 2e-3 * layer.base_norm()).all()
    x = torch.randn(5, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(layer(x)).all()
    for tensor in (x, layer.lora_A, layer.lora_B, layer.magnitude_offset):
        assert torch.isfinite(tensor.grad).all()


def test_the_magnitude_s_gradient_does_not_overflow_in_fp16() -> None:
    layer = make_layer("nf4")
    x, g = (200 * torch.randn(20, size).half() for size in (128, 96))
    ours = ours_of(layer, x, 4 * g)
    assert relative_error(ours["magnitude"], truth_of(layer, x, 4 * g)["magnitude"]) < 1e-2


def test_the_layer_s_constants_do_not_follow_the_default_dtype() -> None:
    try:
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
        layer = make_layer("dense", dtype=torch.float32, trained=False)
        assert layer.base_norm().dtype == layer.row_scale().scale.dtype == torch.float32
        layer = make_layer("nf4", dtype=torch.float32)
        check(layer, 33, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


def test_everything_is_made_on_the_base_s_device() -> None:
    with torch.device("meta"):
        base = NF4Weight.hollow(96, 128)
        a, b, scale = torch.empty(5, 96), torch.empty(5, 96), torch.empty(96)
    layer = DoRALinear(base, 8, 2.0, bias=torch.empty(96, device="meta"))
    made = (*layer.parameters(), *layer.buffers(), layer.merged_weight(), column_dots(a, b, scale))
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_rows_of_norm_zero_have_lora_s_gradients() -> None:
    layer = make_layer("nf4", zero_rows=True)
    with torch.no_grad():
        layer.lora_B[::7] = 0
    check(layer, 33, torch.float32)
    layer.zero_grad()
    x, g = torch.randn(33, 128), torch.randn(33, 96)
    ours, truth = ours_of(layer, x, g), truth_of(layer, x, g)
    assert relative_error(ours["B"][::7], truth["B"][::7]) < BUDGET[torch.float32]
    assert (ours["magnitude"][::7] == 0).all()


@pytest.mark.parametrize("scaling", [0.25, 3.0])
def test_other_scalings_match_fp64(scaling: float) -> None:
    for use_dora in (True, False):
        layer = make_layer("nf4", use_dora=use_dora)
        layer.scaling = scaling
        check(layer, 33, torch.float32)
        if use_dora:
            assert relative_error(layer.weight_norm(), true_norm(layer).detach()) < 1e-6


def backward_flops(**trained: bool) -> int:
    """Of 10 tokens; each of x, lora_A and lora_B is trained unless it is said that it is not."""
    layer = make_layer("nf4")
    x = torch.randn(10, 128, requires_grad=trained.pop("x", True))
    for name, flag in trained.items():
        layer.get_parameter(name).requires_grad_(flag)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return counter.get_total_flops()


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    everything = backward_flops()
    assert everything - backward_flops(lora_A=False) == 2 * 10 * 8 * 128
    assert everything - backward_flops(lora_B=False) == 2 * 10 * 8 * 96
    assert everything - backward_flops(x=False) == 2 * 10 * 96 * 128


def test_the_output_is_kept_for_the_magnitude_s_gradient_only() -> None:
    layer = make_layer("nf4")
    for trained in (True, False):
        layer.magnitude_offset.requires_grad_(trained)
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.shape), t)[1], lambda t: t):
            layer(torch.randn(10, 128))
        assert (torch.Size((10, 96)) in kept) == trained


@pytest.mark.parametrize(("adapter", "tokens"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_an_adapter_of_another_dtype_than_its_input(adapter: torch.dtype, tokens: torch.dtype) -> None:
    layer = make_layer("nf4", dtype=adapter)
    x, g = torch.randn(33, 128).to(tokens), torch.randn(33, 96).to(tokens)
    ours, truth = ours_of(layer, x, g), truth_of(layer, x, g)
    assert (ours["y"].dtype, ours["x"].dtype, ours["A"].dtype) == (tokens, tokens, adapter)
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= BUDGET[torch.bfloat16], name
    thinned = ours_of(make_layer("nf4", dtype=adapter, dropout=0.5), x, g)
    assert all(torch.isfinite(value).all() for value in thinned.values())


def test_any_number_of_leading_dimensions() -> None:
    layer = make_layer("nf4", bias=True)
    x = torch.randn(2, 3, 4, 128)
    flat = layer(x.reshape(24, 128))
    for module in (layer, FrozenLinear(layer.base, layer.bias)):
        assert module(x).shape == (2, 3, 4, 96)
        assert module(x[0, 0, 0]).shape == (96,)
    assert torch.equal(layer(x).reshape(24, 96), flat)


def test_what_a_layer_is_unless_told_otherwise() -> None:
    base = make_layer("nf4").base
    layer = DoRALinear(base, 8, 2.0)
    assert {parameter.dtype for parameter in layer.parameters() if parameter.requires_grad} == {torch.bfloat16}
    assert layer.use_dora
    assert layer.bias is None
    assert layer.dropout.p == 0
    assert "rank=8, scaling=2, use_dora=True" in repr(layer)
    in_fp32 = DoRALinear(base, 8, 2.0, bias=torch.ones(96), dtype=torch.float32)
    assert {parameter.dtype for parameter in in_fp32.parameters() if parameter.requires_grad} == {torch.float32}
    x = torch.randn(3, 128)
    assert torch.equal(in_fp32(x), FrozenLinear(base)(x) + 1)
