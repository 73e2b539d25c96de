"""AdamW for bf16 against torch's in fp32, where plain bf16 stands still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdora.errors import ConfigError
from qdora.optimizer import CompensatedAdamW
from qdora.simulate import simulate_update


def run(optimizer: torch.optim.Optimizer, values: list[Tensor], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for value, gradient in zip(values, step, strict=True):
            value.grad = gradient.to(value.dtype)
        optimizer.step()


def start(dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(5, 7 + i, generator=generator) + 0.5).to(dtype).requires_grad_() for i in range(count)]


def gradients_for(values: list[Tensor], steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(value.shape, generator=generator).bfloat16() for value in values] for _ in range(steps)]


@pytest.mark.parametrize("values_at_once", [80, 16])
def test_in_fp32_it_is_torch_s_adamw(values_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In buckets of two parameters, and in slices of one."""
    monkeypatch.setattr("qdora.optimizer._BUCKET_VALUES", values_at_once)
    ours, theirs = start(torch.float32), start(torch.float32)
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    run(CompensatedAdamW(ours, **settings), ours, gradients_for(ours, 30))
    run(torch.optim.AdamW(theirs, **settings), theirs, gradients_for(theirs, 30))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values_at_once", [2**21, 16])
def test_in_bf16_it_tracks_fp32_where_plain_bf16_stands_still(
    values_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1e-4 on values near 1, where bf16 is spaced 8e-3."""
    monkeypatch.setattr("qdora.optimizer._BUCKET_VALUES", values_at_once)
    exact, ours, plain = start(torch.float32), start(torch.bfloat16), start(torch.bfloat16)
    for value, rounded in zip(exact, ours, strict=True):
        value.data.copy_(rounded.data)
    begun = [value.detach().clone() for value in exact]
    steps = [[torch.ones_like(value) for value in exact]] * 200
    run(torch.optim.AdamW(exact, lr=1e-4, weight_decay=0), exact, steps)
    run(CompensatedAdamW(ours, lr=1e-4), ours, steps)
    run(torch.optim.AdamW(plain, lr=1e-4, weight_decay=0), plain, steps)
    for truth, value, still, before in zip(exact, ours, plain, begun, strict=True):
        assert torch.equal(still, before.bfloat16())
        assert ((value.float() - truth).abs() <= 2**-7 * truth).all()
        assert float((before - value.float()).detach().mean()) == pytest.approx(0.02, rel=0.05)


def test_the_compensation_is_what_rounding_took() -> None:
    exact, ours = start(torch.float32, 1), start(torch.bfloat16, 1)
    exact[0].data.copy_(ours[0].data)
    optimizer = CompensatedAdamW(ours, lr=1e-3)
    gradients = gradients_for(ours, 100)
    run(torch.optim.AdamW(exact, lr=1e-3, weight_decay=0), exact, gradients)
    run(optimizer, ours, gradients)
    whole = ours[0].detach().float() + optimizer.state[ours[0]]["compensation"].float()
    moved = (exact[0] - start(torch.bfloat16, 1)[0].float()).detach()
    assert ((whole - exact[0].detach()).norm() / moved.norm()) < 0.02


def test_the_second_moment_falls_as_it_should() -> None:
    value = [torch.zeros(100_000, dtype=torch.bfloat16, requires_grad=True)]
    optimizer = CompensatedAdamW(value, lr=1e-3)
    torch.manual_seed(0)
    run(optimizer, value, [[torch.ones(100_000)], *[[torch.zeros(100_000)]] * 500])
    mean = float(optimizer.state[value[0]]["exp_avg_sq"].float().mean())
    assert mean == pytest.approx(1e-3 * 0.999**500, rel=0.01)


def test_it_takes_two_bytes_a_parameter_more_than_plain_bf16() -> None:
    def state_bytes(optimizer: torch.optim.Optimizer, values: list[Tensor]) -> int:
        run(optimizer, values, gradients_for(values, 1))
        states = optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t) and t.dim() > 0)

    ours, plain = start(torch.bfloat16), start(torch.bfloat16)
    values = sum(value.numel() for value in ours)
    assert state_bytes(CompensatedAdamW(ours), ours) == state_bytes(torch.optim.AdamW(plain), plain) + 2 * values


def test_a_large_parameter_is_updated_in_slices() -> None:
    """A head takes no more fp32 for its step than many small parameters do."""
    sizes = [2**21, 2**23]
    segments = [simulate_update(CompensatedAdamW, [torch.empty(n, dtype=torch.bfloat16, device="meta")]) for n in sizes]
    assert [segment.start for segment in segments] == [6 * n for n in sizes]
    assert segments[1].peak - segments[1].start == segments[0].peak - segments[0].start == 32 * 2**21


def test_each_slice_has_random_bits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.optimizer._BUCKET_VALUES", 1000)
    value = torch.ones(2000, dtype=torch.bfloat16).requires_grad_()
    optimizer = CompensatedAdamW([value])
    run(optimizer, [value], [[torch.full((2000,), 0.3)]])
    first, second = optimizer.state[value]["exp_avg_sq"].split(1000)
    assert first.unique().numel() == 2
    assert not torch.equal(first, second)


def test_resuming_gives_the_same_bits() -> None:
    values, again = start(torch.bfloat16), start(torch.bfloat16)
    gradients = gradients_for(values, 10)
    optimizer = CompensatedAdamW(values, lr=1e-2)
    torch.manual_seed(0)
    run(optimizer, values, gradients[:5])
    saved, bits = optimizer.state_dict(), torch.get_rng_state()
    for value, copy in zip(values, again, strict=True):
        copy.data.copy_(value.data)
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, saved)
    run(optimizer, values, gradients[5:])
    resumed = CompensatedAdamW(again, lr=1e-2)
    resumed.load_state_dict(saved)
    torch.set_rng_state(bits)
    run(resumed, again, gradients[5:])
    for a, b in zip(values, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_state_fits_whatever_dtype_it_is_loaded_for(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def stepped(parameter: torch.nn.Parameter, state: dict[str, Any] | None, steps: int) -> CompensatedAdamW:
        optimizer = CompensatedAdamW([parameter])
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 1e-4
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return optimizer

    before, after = (torch.nn.Parameter(torch.ones(64, dtype=dtype)) for dtype in dtypes)
    first = stepped(before, None, 1)
    second = stepped(after, first.state_dict(), 100)
    assert ("compensation" in second.state[after]) == (after.dtype == torch.bfloat16)
    assert all(value.dtype == after.dtype for value in second.state[after].values())
    assert (after.float() - 0.99).abs().max() < 2e-3


def test_a_state_of_something_else_is_refused() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours, torchs = CompensatedAdamW(parameters), torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    for optimizer in (ours, torchs):
        optimizer.step()
    for other, message in (
        (CompensatedAdamW(parameters[:1]), r"groups of \[2\] parameters, and there are \[1\]"),
        (CompensatedAdamW([torch.nn.Parameter(torch.ones(n)) for n in (3, 4)]), r"other parameters: \(3,\) .* \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="of another optimizer"):
        ours.load_state_dict(torchs.state_dict())


def test_closures_and_other_dtypes() -> None:
    value = torch.ones(3, requires_grad=True)
    optimizer = CompensatedAdamW([value], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value.sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3
    assert torch.allclose(value, torch.full((3,), 0.9))
    with pytest.raises(ConfigError, match=r"float32 and bfloat16, found torch\.float16"):
        CompensatedAdamW([torch.ones(3, dtype=torch.float16, requires_grad=True)])


def test_rounding_depends_on_seed_and_step_alone() -> None:
    """Processes that draw other numbers meanwhile (dropout) must round alike, and so must a resumed run."""
    gradients = gradients_for(start(torch.bfloat16), 6)

    def trained(seed: int, resume_at: int | None = None) -> list[Tensor]:
        values = start(torch.bfloat16)
        torch.manual_seed(7)
        optimizer = CompensatedAdamW(values, lr=1e-3)
        torch.manual_seed(seed)
        run(optimizer, values, gradients[:resume_at])
        if resume_at is not None:
            state, optimizer = optimizer.state_dict(), CompensatedAdamW(values, lr=1e-3)
            optimizer.load_state_dict(state)
            run(optimizer, values, gradients[resume_at:])
        return [optimizer.state[value]["exp_avg_sq"] for value in values]

    whole, other, resumed = trained(0), trained(1), trained(2, resume_at=3)
    for a, b, c in zip(whole, other, resumed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
