"""One training step over fake tensors: what is alive, and when.

The idea. torch's fake tensors have shapes and lifetimes but no values. The model's own code, our layers, the loss and
the optimizer run over them as they would over real ones, and a dispatch mode counts the bytes of each storage from its
birth to its death. So every architecture is reckoned by what it does, not by what a formula believes that it does.

The constraint. A 70B model must take seconds, and each operation over fake tensors costs some 50 µs. Decoder layers are
alike, so the step is run with three of them, the last ones with adapters: a first one, whose input needs no gradient, a
middle one, and a last one. What n layers keep and hold follows from the bytes of one.

What is not seen: memory that a kernel takes and gives back within one operation (a matrix product's workspace).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qdora.dora import count_step
from qdora.experts import RoutedExperts, most_uneven, uneven_for_all
from qdora.inject import decoder_layers
from qdora.ledger import Diary, Ledger
from qdora.loss import positions_at_once, summed_nll
from qdora.workspace import WHOLE, Workspace, assume

__all__ = [
    "Batch",
    "Segment",
    "StepTrace",
    "cut",
    "first_trained",
    "head_is_plain",
    "rehearse_step",
    "simulate_loss",
    "simulate_step",
    "simulate_update",
    "simulate_updates",
    "trained_bytes",
]

_SIMULATED_LAYERS = 3
_LOSS_CHUNKS = 4
_ATTENTION = "sdpa_over_fake_tensors"


@dataclass(frozen=True)
class Batch:
    """One micro-batch, as large as it gets."""

    rows: int
    length: int
    """Tokens a row."""
    padded: bool
    """Whether rows differ in length, so that attention needs a mask."""
    packed: bool = False
    """Whether a row holds several texts, so that attention needs a mask between them."""


@dataclass(frozen=True)
class Segment:
    """A part of the step, in bytes above what is alive between two steps."""

    start: int
    peak: int


@dataclass(frozen=True)
class StepTrace:
    """A step with three layers, or fewer."""

    forward: tuple[Segment, ...]
    """Of each layer, the embedding's included in the first."""
    loss: Segment
    """From the last hidden states to the loss."""
    backward: tuple[Segment, ...]
    """Of each layer, the recompute included, in the order of the layers."""
    kept_bytes: int
    """What one layer keeps for the backward: under checkpointing its input, and the outputs that it holds."""
    gradient_bytes: tuple[int, ...]
    """What the gradients of each layer take, in the order of the layers."""


def trained_bytes(module: nn.Module) -> int:
    """What the gradients of a module take."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def first_trained(model: Any) -> int:
    """The number of the first layer that gradients go through: the first that trains, or 0 if the embedding does."""
    if trained_bytes(model.get_input_embeddings()):
        return 0
    return next((number for number, layer in enumerate(decoder_layers(model)) if trained_bytes(layer)), 0)


def cut(model: Any) -> None:
    """Leave a model as many layers as are simulated, in place: those that train before the others, and the last ones.

    None is left that comes before the first that trains, for no gradient goes there.
    """
    layers = decoder_layers(model)
    ranked = sorted(range(len(layers)), key=lambda number: (trained_bytes(layers[number]) > 0, number))
    others = sorted({*ranked[:-_SIMULATED_LAYERS], *range(first_trained(model))}, reverse=True)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(layers) and module[0] is layers[0]:
            for number in others:
                del module[number]


def simulate_step(
    model: nn.Module, batch: Batch, workspace: Workspace, checkpointing: bool = True, lean_loss: bool = True
) -> StepTrace:
    """Run forward, loss and backward.

    Args:
        model: on the meta device, with adapters, and cut.
        workspace: of the device that is reckoned for.
        checkpointing: whether layers are recomputed; without, what a layer keeps is all that its backward needs.
        lean_loss: whether the loss is ours; otherwise the model's own, with all logits.
    """
    with _over_fakes(model, batch, workspace, checkpointing, lean_loss) as step:
        step.run()  # makes what stays for good
        step.forget_gradients()
        count_step()
        step.run()
        return step.trace()


def rehearse_step(model: nn.Module, batch: Batch) -> None:
    """Run forward, loss and backward once, under checkpointing, for what is seen on the way or goes wrong.

    Args:
        model: on the meta device, with adapters, and cut.
    """
    with _over_fakes(model, batch, WHOLE, checkpointing=True, lean_loss=True) as step:
        step.run()


def head_is_plain(model: nn.Module) -> bool:
    """Whether logits are the head's product with the last hidden states: if the model's forward does nothing after it.

    The same question as `scoring.ScoredModel.head_is_plain` answers by values, of a model that has none.

    Args:
        model: on the meta device.
    """
    any_model: Any = deepcopy(model)
    head, backbone = any_model.get_output_embeddings(), any_model.base_model
    if head is None or backbone is any_model:
        return False
    with FakeTensorMode(), assume(WHOLE):
        _materialize(any_model)
        any_model.eval()
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False}
        with torch.no_grad():
            any_model(**inputs)  # makes what stays for good
        with torch.no_grad(), Diary() as alone:
            functional.linear(backbone(**inputs).last_hidden_state, head.weight, head.bias)
        with torch.no_grad(), Diary() as whole:
            any_model(**inputs)
    return alone.computations == whole.computations


def simulate_loss(head: nn.Module, positions: int, chunk_bytes: int, workspace: Workspace) -> int:
    """The most that the loss over so many positions takes beside the hidden states, in bytes.

    Every chunk takes the same, and what lasts longer than one grows evenly with the positions: a few chunks tell of any
    number, and a large vocabulary has hundreds.

    Args:
        head: the output head, on the meta device.
        workspace: of the device that is reckoned for.
    """
    assert isinstance(head.weight, Tensor)
    step = positions_at_once(len(head.weight), head.weight.dtype, head.weight.device, chunk_bytes)
    if positions <= _LOSS_CHUNKS * step:
        return _loss_peak(head, positions, chunk_bytes, workspace)
    counts = [chunks * step for chunks in (_LOSS_CHUNKS - 1, _LOSS_CHUNKS)]
    few, more = (_loss_peak(head, count, chunk_bytes, workspace) for count in counts)
    return more + (more - few) * (positions - _LOSS_CHUNKS * step) // step


def _loss_peak(head: nn.Module, positions: int, chunk_bytes: int, workspace: Workspace) -> int:
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    with FakeTensorMode(), assume(workspace):
        weight_VH = torch.empty(weight.shape, dtype=weight.dtype, requires_grad=weight.requires_grad)
        bias_V = (
            torch.empty(bias.shape, dtype=bias.dtype, requires_grad=bias.requires_grad)
            if isinstance(bias, Tensor)
            else None
        )
        hidden = torch.empty(positions, weight.shape[1], dtype=weight.dtype, requires_grad=True)
        chosen, labels = (torch.zeros(positions, dtype=torch.long) for _ in range(2))
        ledger = Ledger()
        ledger.ignore([weight_VH, bias_V, hidden, chosen, labels])
        with ledger:
            loss = summed_nll(hidden[chosen], weight_VH, labels, bias_V, chunk_bytes)
            del loss
        return ledger.most


def simulate_update(make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes: Sequence[Tensor]) -> Segment:
    """One optimizer step over parameters like these (on the meta device), in bytes.

    Returns:
        start: the state that the optimizer keeps; peak: the most that it takes beside parameters and gradients.
    """
    with FakeTensorMode():
        params = [torch.empty(p.shape, dtype=p.dtype, requires_grad=True) for p in shapes]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        ledger = Ledger()
        ledger.ignore([*params, *(p.grad for p in params)])
        with ledger:
            optimizer = make(params)
            optimizer.step()
            state = ledger.held
            ledger.restart()
            optimizer.step()
    return Segment(state, ledger.most)


def simulate_updates(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], parts: Iterable[Sequence[Tensor]]
) -> Segment:
    """As `simulate_update`, of an optimizer that goes from part to part; those that are alike are run once."""
    known: dict[tuple[Any, ...], Segment] = {}
    state = workspace = 0
    for part in parts:
        kind = tuple((parameter.dtype, parameter.numel()) for parameter in part)
        if kind not in known:
            known[kind] = simulate_update(make, part)
        state += known[kind].start
        workspace = max(workspace, known[kind].peak - known[kind].start)
    return Segment(state, state + workspace)


class _Step:
    """Runs a micro-batch and notes what is alive where one layer ends and the next begins."""

    def __init__(self, model: Any, batch: Batch, ledger: Ledger, checkpointing: bool, lean_loss: bool) -> None:
        self._model, self._ledger = model, ledger
        self._checkpointing, self._lean_loss = checkpointing, lean_loss
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        # Every token but the last of each row carries loss: no batch takes more.
        positions = batch.rows * (batch.length - 1)
        self._scored = (torch.zeros(positions, dtype=torch.long), torch.zeros(positions, dtype=torch.long))
        self._labels = torch.zeros(positions, dtype=torch.long)
        self._mask = torch.ones(batch.rows, batch.length, dtype=torch.long) if batch.padded else None
        self._marks: list[tuple[int, int]] = []
        model.train()
        if not lean_loss:
            model.get_output_embeddings().register_forward_pre_hook(lambda *_: self._mark())
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = self._call_layer  # type: ignore[assignment]

    def run(self) -> None:
        """One micro-batch; the marks are of the last that ran."""
        self._ledger.restart()
        self._marks = []
        self._base = self._ledger.held
        loss = self._lean() if self._lean_loss else self._model(**self._inputs(), labels=self._ids).loss
        self._mark()
        loss.backward()
        self._mark()

    def _inputs(self) -> dict[str, Any]:
        return {"input_ids": self._ids, "attention_mask": self._mask, "use_cache": False}

    def _lean(self) -> Tensor:
        hidden = self._model.base_model(**self._inputs()).last_hidden_state
        self._mark()
        head = self._model.get_output_embeddings()
        # In one piece: how much chunks take is reckoned apart, by `simulate_loss`.
        with assume(WHOLE):
            return summed_nll(hidden[self._scored], head.weight, self._labels, head.bias, chunk_bytes=2**60)

    def _call_layer(self, layer: Callable[..., Any], *args: Any) -> Any:
        self._mark()
        result = checkpoint(layer, *args, use_reentrant=False) if self._checkpointing else layer(*args)
        hidden = result if isinstance(result, Tensor) else result[0]
        hidden.register_hook(lambda _: self._mark())  # its gradient is ready: the layer's backward begins
        return result

    def _mark(self) -> None:
        self._marks.append((self._ledger.held, self._ledger.most))
        self._ledger.restart()

    def forget_gradients(self) -> None:
        """As an optimizer does between two steps."""
        for parameter in self._trained:
            parameter.grad = None

    def trace(self) -> StepTrace:
        """The marks of the last run, cut into segments."""
        n = len(decoder_layers(self._model))
        gradient_bytes = tuple(map(trained_bytes, decoder_layers(self._model)))
        starts = [held - self._base for held, _ in self._marks]
        peaks = [most - self._base for _, most in self._marks[1:]]
        segments = [Segment(start, peak) for start, peak in zip(starts[:-1], peaks, strict=True)]
        forward, loss, backward = segments[:n], segments[n], segments[n + 1 :]
        # Between the loss and the last layer only the final norm's gradient is made.
        top = Segment(backward[1].start, max(backward[0].peak, backward[1].peak))
        down = (top, *backward[2:])
        first = Segment(0, max(self._marks[0][1] - self._base, forward[0].peak))
        kept = loss.start - forward[-1].start
        if n > 1:
            kept = forward[-1].start - forward[-2].start
        return StepTrace((first, *forward[1:]), loss, tuple(reversed(down)), kept, gradient_bytes)


@contextmanager
def _over_fakes(
    model: nn.Module, batch: Batch, workspace: Workspace, checkpointing: bool, lean_loss: bool
) -> Iterator[_Step]:
    """A step of a copy of the model; within, operations are over fake tensors, and counted."""
    model = deepcopy(model)
    with FakeTensorMode(), assume(workspace):
        _materialize(model)
        if not batch.packed:
            _leave_out_needless_masks(model)
        ledger = Ledger()
        with ledger:
            yield _Step(model, batch, ledger, checkpointing, lean_loss)


def _materialize(model: nn.Module) -> None:
    """From the meta device to fake tensors of the CPU, whose kernels decide what is kept."""
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    for experts in model.modules():
        if isinstance(experts, RoutedExperts):
            # fakes have no values to count
            trains = any(parameter.requires_grad for parameter in experts.parameters())
            experts.count = uneven_for_all if trains else most_uneven


def _leave_out_needless_masks(model: Any) -> None:
    """transformers makes a mask unless it sees in the positions that no row is packed, and fakes have no values to see.

    It lets attentions be registered by name, and their masks too: this one is told what the positions would say.
    """
    if model.config._attn_implementation != "sdpa":
        return

    def mask(allow_is_causal_skip: bool = True, **rest: Any) -> Tensor | None:
        made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](allow_is_causal_skip=True, **rest)
        return made

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, mask)
    model.set_attn_implementation(_ATTENTION)
