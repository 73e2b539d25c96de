"""Mixtures of experts: each routed expert's matrices are linears of their own, and compute only where tokens come.

The idea. transformers 5 keeps the experts of a layer in two stacked parameters, (E, 2I, H) for gate and up and
(E, H, I) for down; they are nine tenths of such a model, and bitsandbytes packs only linears. On the Hub they lie as
they were trained, a matrix for each expert and projection. So they are here too: a `FrozenLinear` each, with an NF4
weight of its own. What is true of every other linear is then true of them, with nothing written twice: they are
quantized from their files one by one, multiplied tile by tile, streamed with their layer, counted by the estimate,
given adapters (DoRA with a magnitude for each output of each expert), saved under the names that PEFT has for them,
and merged.

The forward sorts the tokens by expert and runs each expert that has any on its own tokens. An expert without tokens is
not dequantized, and no dense copy of a matrix larger than a tile ever exists. The sum over a token's experts is fp32,
in the forward and, of its gradients, in the backward: there one tensor goes from expert to expert, and each adds its
tokens' gradients to it. Left to autograd, each expert would make a tensor of all tokens, nearly all of it zeros, and
these would be summed in the dtype of the arithmetic.

The constraint. A module is taken for experts by what it is: nothing but the two stacks, of shapes that agree, and
transformers' description of the arithmetic (`use_experts_implementation`), which must say gated, concatenated, not
transposed, without biases and without a norm behind. What is otherwise (GPT-OSS: transposed, interleaved, with biases)
stays as transformers made it, in 16 bits. How gate and up are joined is left to the module's own method, for some
families clamp; unless it gives the bits of `gated`, which keeps less.

The rejected alternatives. A stack quantized as one tensor is a format that nobody else reads. A forward registered with
transformers (`ALL_EXPERTS_FUNCTIONS`) is chosen for the whole model by a name in its config, and would need the packed
stacks to be parameters of transformers' own class. All tokens gathered at once, and split, have one node in the
backward too, but then the inputs of all experts, k times the hidden states, are alive together, and their gradients.

The price: three products for each expert with tokens, one after the other, where a grouped kernel over dense stacks has
one for all. On a GPU with many small experts the launches will show.

Shape suffixes: T tokens, S = T·k choices (k experts a token), H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qdora.base import BaseWeight
from qdora.dense import DenseWeight
from qdora.dora import FrozenLinear
from qdora.gated import activation_of, gated, joins_as, makes_a_gradient_of_its_own

__all__ = [
    "STACKS",
    "RoutedExperts",
    "count_choices",
    "expand_experts",
    "hollow_experts",
    "most_uneven",
    "router_paths",
    "stacks_left",
    "uneven_for_all",
]

STACKS = {"gate_up_proj", "down_proj"}


class RoutedExperts(nn.Module):
    """The experts of a layer, each with three linears; takes the place of transformers' stacked ones.

    Args:
        original: the stacked module. Its stacks are taken out of it; how it joins gate and up stays in use.

    It has no experts until `fill` makes them.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = original.down_proj.shape
        names = _names_in_files(original)
        assert names is not None  # `_is_stacked` has seen to that
        self.names = names
        for name in STACKS:
            delattr(original, name)
        self._join = _joined(original)
        self.count: Callable[[Tensor, int, int], list[int]] = count_choices

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}"

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (out_features, in_features) of one expert's linears: gate, up and down."""
        gate, up, down = self.names
        inwards, outwards = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        return {gate: inwards, up: inwards, down: outwards}

    def stack_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name → shape of the two stacks that transformers makes of the experts: gate and up in one, and down."""
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        return {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}

    def cut(self, gate_up_E2IH: Tensor, down_EHI: Tensor, number: int, name: str) -> Tensor:
        """A window on the stacks: the matrix of one expert's linear, (out_features, in_features)."""
        gate, _, down = self.names
        if name == down:
            return down_EHI[number]
        half = self.intermediate_size
        return gate_up_E2IH[number, :half] if name == gate else gate_up_E2IH[number, half:]

    def fill(self, weight_of: Callable[[int, str], BaseWeight]) -> None:
        """Make the experts.

        Args:
            weight_of: the weight of an expert's linear, by the expert's number and the linear's name.
        """
        for number in range(self.num_experts):
            linears = {name: FrozenLinear(weight_of(number, name)) for name in self.names}
            self.add_module(str(number), nn.ModuleDict(linears))

    def forward(self, hidden_TH: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """Σ over each token's k experts of weight · expert(token), (T, H); the arguments are transformers'."""
        choice_S, order_S = expert_Tk.reshape(-1).sort(stable=True)
        token_S, weight_S = order_S // expert_Tk.shape[-1], weight_Tk.reshape(-1)[order_S]
        counts = self.count(choice_S, self.num_experts, expert_Tk.shape[-1])
        total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
        values_TH, carrier_TH = hidden_TH.detach(), _Carrier.apply(hidden_TH)
        idle: list[Tensor] = []
        for number, (token_N, weight_N) in enumerate(zip(token_S.split(counts), weight_S.split(counts), strict=True)):
            if len(token_N):
                x_NH, carrier_TH = _Gathered.apply(values_TH, carrier_TH, token_N)
                y_NH = self._expert(number, x_NH) * weight_N[:, None]
                total_TH.index_add_(0, token_N, y_NH.float())
            else:
                idle += [p for p in self.get_submodule(str(number)).parameters() if p.requires_grad]
        if idle and torch.is_grad_enabled():
            # A gradient of zero and no gradient are two things to optimizers, and to processes that sum them.
            total_TH = total_TH + 0 * torch.stack([parameter.sum().float() for parameter in idle]).sum()
        return total_TH.to(hidden_TH.dtype)

    def _expert(self, number: int, x_NH: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(f"{number}.{name}") for name in self.names)
        y_NH: Tensor = down(self._join(gate(x_NH), up(x_NH), consumes_gradient=makes_a_gradient_of_its_own(down)))
        return y_NH


class _Carrier(torch.autograd.Function):
    """What carries the gradient of the hidden states, in fp32, from expert to expert: it has no values of its own."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor) -> Tensor:
        ctx.dtype = hidden_TH.dtype
        return hidden_TH.new_empty((), dtype=torch.float32).expand(hidden_TH.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_TH: Tensor) -> Tensor:
        return total_TH.to(ctx.dtype)


class _Gathered(torch.autograd.Function):
    """An expert's tokens, and the carrier, to be handed to the next expert: its backward comes before this one's."""

    @staticmethod
    def forward(ctx: Any, values_TH: Tensor, carrier_TH: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(token_N)
        ctx.shape = values_TH.shape
        ctx.set_materialize_grads(False)  # the last expert's carrier went nowhere
        return values_TH[token_N], carrier_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NH: Tensor | None, total_TH: Tensor | None) -> tuple[None, Tensor | None, None]:
        if g_NH is None:
            return None, total_TH, None
        if total_TH is None:
            total_TH = torch.zeros(ctx.shape, dtype=torch.float32, device=g_NH.device)
        (token_N,) = ctx.saved_tensors
        return None, total_TH.index_add_(0, token_N, g_NH.float()), None


def _joined(original: Any) -> Callable[..., Tensor]:
    """How stacked experts join gate and up."""
    # A method, which keeps its module out of ours: transformers would look for the stacks to initialize them.
    theirs = partial(_join_stacked, original._apply_gate)
    activation = activation_of(getattr(original, "act_fn", None))
    if activation is None or not joins_as(theirs, activation):
        return theirs
    return partial(gated, activation=activation)


def _join_stacked(
    join: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, consumes_gradient: bool = False
) -> Tensor:
    return join(torch.cat([gate, up], dim=-1))


def count_choices(choice_S: Tensor, experts: int, per_token: int) -> list[int]:
    """How many of the choices fell on each expert."""
    found: list[int] = torch.bincount(choice_S, minlength=experts).tolist()
    return found


def most_uneven(choice_S: Tensor, experts: int, per_token: int) -> list[int]:
    """The counts that take most memory, for choices without values: every token chose the same experts."""
    return [len(choice_S) // per_token if number < per_token else 0 for number in range(experts)]


def uneven_for_all(choice_S: Tensor, experts: int, per_token: int) -> list[int]:
    """Likewise where every expert has gradients of its own: one expert has every token, the others share the rest."""
    tokens, others = len(choice_S) // per_token, max(1, experts - 1)
    share, over = divmod(len(choice_S) - tokens, others)
    return [tokens, *(share + (number < over) for number in range(experts - 1))]


def hollow_experts(model: nn.Module) -> dict[str, RoutedExperts]:
    """Put `RoutedExperts` without experts in the place of every stacked module, in place, and drop the stacks.

    Returns:
        By path in the model.
    """
    found = {path: module for path, module in model.named_modules() if _is_stacked(path, module)}
    hollow = {path: RoutedExperts(module) for path, module in found.items()}
    for path, experts in hollow.items():
        model.set_submodule(path, experts)
    return hollow


def expand_experts(model: nn.Module) -> None:
    """As `hollow_experts`, and fill them with windows on the stacks that were there, which are not copied."""
    stacks = {
        path: (module.gate_up_proj, module.down_proj)
        for path, module in model.named_modules()
        if _is_stacked(path, module)
    }
    for path, experts in hollow_experts(model).items():
        experts.fill(partial(_window, experts, *stacks[path]))


def _window(experts: RoutedExperts, gate_up_E2IH: Tensor, down_EHI: Tensor, number: int, name: str) -> BaseWeight:
    return DenseWeight(experts.cut(gate_up_E2IH, down_EHI, number, name))


def router_paths(model: nn.Module) -> list[str]:
    """Paths of the linears beside experts, which choose among them or weigh them: they stay as they are."""
    return [
        f"{path.rpartition('.')[0]}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for name, sibling in model.get_submodule(path.rpartition(".")[0]).named_children()
        if isinstance(sibling, nn.Linear | FrozenLinear)
    ]


def stacks_left(model: nn.Module) -> Iterator[str]:
    """Paths of the experts whose stacks are of another kind than those that become linears."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "experts" and any(p.dim() > 2 for p in module.parameters(recurse=False)):
            yield path


def _is_stacked(path: str, module: Any) -> bool:
    """Whether these are experts of the kind that the top of this file tells."""
    stacks = dict(module.named_parameters(recurse=False))
    if path.rpartition(".")[2] != "experts" or stacks.keys() != STACKS or not hasattr(module, "_apply_gate"):
        return False
    gate_up, down = stacks["gate_up_proj"], stacks["down_proj"]
    if gate_up.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return False
    described = module.has_gate and module.is_concatenated and not module.is_transposed and not module.has_bias
    return described and _names_in_files(module) is not None and not getattr(module, "has_post_expert_norm", False)


def _names_in_files(experts: Any) -> tuple[str, str, str] | None:
    """What gate, up and down are called in this family's files (Mixtral: w1, w3, w2); None if they lie there otherwise.

    transformers knows how it puts the stacks together.
    """
    sources = {
        transform.target_patterns[0].rpartition(".")[2]: transform.source_patterns
        for transform in get_checkpoint_conversion_mapping(getattr(experts.config, "model_type", None)) or ()
        if transform.target_patterns[0].endswith((".experts.gate_up_proj", ".experts.down_proj"))
    }
    patterns = [*sources.get("gate_up_proj", ()), *sources.get("down_proj", ())]
    if len(patterns) != 3 or not all(".experts.*." in pattern for pattern in patterns):
        return None
    gate, up, down = (pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns)
    return gate, up, down
