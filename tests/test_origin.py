"""A linear that keeps what its norm's output was made of: the same gradients, less kept, and never a stale note."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from qdora import ConfigError
from qdora.dora import DoRALinear
from qdora.norm import RMSNorm
from qdora.origin import origin_of
from tests.test_dora import BUDGET, make_layer, relative_error, truth_of

SIZE, TOKENS = 128, 40


def make_norm(dtype: torch.dtype = torch.float32) -> RMSNorm:
    torch.manual_seed(3)
    return RMSNorm(nn.Parameter((torch.rand(SIZE) + 0.5).to(dtype), requires_grad=False), 1e-5)


def some(dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of very different lengths, which want a gradient."""
    torch.manual_seed(4)
    return (torch.randn(2, TOKENS // 2, SIZE) * torch.logspace(-2, 2, 20)[:, None]).to(dtype).requires_grad_()


def output_gradient(layer: DoRALinear, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(2, TOKENS // 2, layer.out_features).to(dtype)


def gradients(layer: DoRALinear, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(y, parameters, output_gradient(layer, y.dtype)), strict=True))


def forgetful(z: Tensor) -> Tensor:
    """The same values, another tensor."""
    return z.view_as(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [True, False])
def test_gradients_are_those_of_fp64_as_near_as_without(dtype: torch.dtype, use_dora: bool) -> None:
    layer, norm, x = make_layer(use_dora=use_dora, dtype=dtype), make_norm(dtype), some(dtype)
    assert origin_of(norm(x)) is not None
    noted, plain = gradients(layer, layer(norm(x))), gradients(layer, layer(forgetful(norm(x))))
    rms = x.detach().double().square().mean(-1, keepdim=True).add(1e-5).sqrt()
    normed = (x.detach() / rms * norm.weight.double()).view(TOKENS, SIZE)
    true = truth_of(layer, normed, output_gradient(layer, dtype).view(TOKENS, -1))["A"]
    error, usual = (relative_error(each["lora_A"], true) for each in (noted, plain))
    assert error < BUDGET[dtype]
    assert error <= 1.1 * usual + 2e-7
    for name in noted.keys() - {"lora_A"}:
        assert torch.equal(noted[name], plain[name]), name


def test_several_linears_share_what_is_kept() -> None:
    norm, x = make_norm(), some()
    layers = [make_layer("nf4"), make_layer("dense", out_features=64)]
    together = [gradients(layer, layer(z)) for z in [norm(x)] for layer in layers]
    apart = [gradients(layer, layer(forgetful(norm(x)))) for layer in layers]
    torch.testing.assert_close(together, apart)


def kept_by(layer: DoRALinear, z: Tensor) -> set[int]:
    """The addresses of the storages that autograd keeps."""
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(z)
    return kept


def test_the_input_is_kept_by_nobody() -> None:
    layer, x = make_layer(), some()
    z = make_norm()(x)
    assert z.untyped_storage().data_ptr() not in kept_by(layer, z)
    assert x.untyped_storage().data_ptr() in kept_by(layer, z)
    assert z.untyped_storage().data_ptr() in kept_by(layer, forgetful(z))
    layer.lora_A.requires_grad_(False)
    assert x.untyped_storage().data_ptr() not in kept_by(layer, z)


def in_fp16() -> Tensor:
    return make_norm(torch.float16)(some(torch.float16))


def with_a_wider_weight() -> Tensor:
    return make_norm()(some(torch.bfloat16))


def of_strided_values() -> Tensor:
    x = some().transpose(0, 1)
    return make_norm()(x)


def without_gradient() -> Tensor:
    with torch.no_grad():
        return make_norm()(some())


def after_another_operation() -> Tensor:
    return make_norm()(some()) * 1


def changed_in_place() -> Tensor:
    return make_norm()(some()).add_(1)


def changed_through_a_view() -> Tensor:
    z = make_norm()(some())
    z[0].mul_(2)
    return z


def changed_behind_autograd() -> Tensor:
    z = make_norm()(some())
    z.detach().mul_(2)
    return z


def of_values_that_changed() -> Tensor:
    x = some() * 1
    z = make_norm()(x)
    x.detach().add_(1)
    return z


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return make_norm()(some() * 1)


def of_an_ordinary_tensor_in_inference_mode() -> Tensor:
    x = some().detach()
    with torch.inference_mode():
        return make_norm()(x)


@pytest.mark.parametrize(
    "make",
    [
        in_fp16,
        with_a_wider_weight,
        of_strided_values,
        without_gradient,
        after_another_operation,
        changed_in_place,
        changed_through_a_view,
        changed_behind_autograd,
        of_values_that_changed,
        of_an_ordinary_tensor_in_inference_mode,
        in_inference_mode,
    ],
)
def test_what_has_no_origin(make: Callable[[], Tensor]) -> None:
    assert origin_of(make()) is None


def test_a_norm_s_output_that_is_changed_is_kept_as_it_is() -> None:
    layer, norm, x = make_layer(), make_norm(), some()
    changed, plain = norm(x), forgetful(norm(x)) + 1
    changed += 1
    torch.testing.assert_close(gradients(layer, layer(changed)), gradients(layer, layer(plain)))


def test_a_norm_s_output_may_be_changed_after_the_product() -> None:
    layer, norm, x = make_layer(), make_norm(), some()
    z = norm(x)
    y = layer(z)
    z.detach().zero_()
    torch.testing.assert_close(gradients(layer, y), gradients(layer, layer(norm(x))))


def test_a_note_lives_as_long_as_its_tensor() -> None:
    z = make_norm()(some().detach())
    origin = origin_of(z)
    assert origin is not None
    values = weakref.ref(origin.values)
    del origin
    assert values() is not None
    del z
    assert values() is None


def last_in_a_block(
    norm: RMSNorm, layer: DoRALinear, x: Tensor, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """A linear behind a norm, where the recompute ends."""
    y = checkpoint(lambda x: layer(change(norm(x * 1))), x, use_reentrant=False)
    return gradients(layer, y)


@pytest.mark.parametrize("use_dora", [True, False])
def test_forward_and_recompute_decide_alike(use_dora: bool) -> None:
    """What nobody holds, and wants no gradient, is dropped after the forward and lives on in the recompute."""
    layer, norm, x = make_layer(use_dora=use_dora), make_norm(), some().detach()
    norm.weight.requires_grad_(True)
    layer.hold_output = use_dora
    expected = gradients(layer, layer(forgetful(norm(x))))
    torch.testing.assert_close(last_in_a_block(norm, layer, x, lambda z: z), expected)


@pytest.mark.parametrize("forward_forgets", [True, False])
def test_forward_and_recompute_that_differ_are_an_error(forward_forgets: bool) -> None:
    calls = []

    def change(z: Tensor) -> Tensor:
        calls.append(1)
        return forgetful(z) if (len(calls) == 1) == forward_forgets else z

    with pytest.raises(CheckpointError):
        last_in_a_block(make_norm(), make_layer(use_dora=False), some(), change)


def test_a_checkpoint_keeps_no_origin() -> None:
    layer, norm, alive = make_layer(), make_norm(), []

    def block(x: Tensor) -> Tensor:
        inner = x * 2
        alive.append(weakref.ref(inner))
        return layer(norm(inner)) @ torch.ones(96, SIZE) + inner

    y = checkpoint(block, some(), use_reentrant=False)
    assert alive[0]() is None
    y.sum().backward()
    recomputed = layer.lora_A.grad.clone()
    layer.zero_grad()
    block(some()).sum().backward()
    assert torch.equal(recomputed, layer.lora_A.grad)


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_a_norm_s_input_that_is_changed_under_a_checkpoint_is_an_error(wants_gradient: bool) -> None:
    layer, norm = make_layer(), make_norm()

    def block(x: Tensor) -> Tensor:
        inner = x * 2
        y = layer(norm(inner))
        inner.detach().add_(1)
        return y @ torch.ones(96, SIZE) + inner

    y = checkpoint(block, some().requires_grad_(wants_gradient), use_reentrant=False)
    with pytest.raises(ConfigError, match="what a norm was given was changed in place"):
        y.sum().backward()


def test_a_checkpoint_keeps_no_more_than_without() -> None:
    norm, layer = make_norm(), make_layer()
    kept = []
    for change in (lambda z: z, forgetful):
        graph = [checkpoint(lambda x, change=change: layer(change(norm(x))), some(), use_reentrant=False)]
        gc.collect()
        kept.append(sum(each.nbytes for each in gc.get_objects() if type(each) is Tensor))
        del graph
    assert kept[0] == kept[1]


def test_the_norm_s_weight_may_be_taken_away_before_the_backward() -> None:
    """As FSDP2 does with a norm that is a unit of its own."""
    layer, norm, x = make_layer(), make_norm(), some()
    expected = gradients(layer, layer(norm(x)))
    y = layer(norm(x))
    norm.weight.data.zero_()
    torch.testing.assert_close(gradients(layer, y), expected)


def test_dropout_keeps_what_it_left() -> None:
    layer, norm, x = make_layer(dropout=0.5), make_norm(), some()
    found = []
    for change in (lambda z: z, forgetful):
        torch.manual_seed(6)
        found.append(gradients(layer, layer(change(norm(x)))))
    torch.testing.assert_close(found[0], found[1])


def test_under_autocast_and_compile() -> None:
    layer, norm, x = make_layer(), make_norm(), some()
    expected = gradients(layer, layer(norm(x)))
    compiled = torch.compile(nn.Sequential(norm, layer), backend="eager")
    torch.testing.assert_close(gradients(layer, compiled(x)), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(layer, layer(norm(x)))
    assert relative_error(found["lora_A"], expected["lora_A"].double()) < 2e-2
