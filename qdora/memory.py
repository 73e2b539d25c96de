"""What a training run needs of memory, part by part.

A step's peak is reckoned in three parts. What stays from step to step (base weights, embeddings, adapters, optimizer
state) is counted exactly, from the shapes of the whole model. What comes and goes within a layer, the loss and the
optimizer's update is taken from a step over fake tensors (`simulate`). What grows with depth (kept inputs, gradients)
is laid between them: while layer i of L is in its backward, i inputs are still kept and L - i layers have gradients,
each its own, for ranks and targets may differ; below the first layer that trains nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from qdora.dora import DoRALinear, FrozenLinear
from qdora.errors import ConfigError, reason
from qdora.groups import Rates, parameter_groups
from qdora.holding import linears_to_hold
from qdora.inject import adapted_linears, decoder_layers, freeze_dense, hold_outputs
from qdora.optimizer import CompensatedAdamW, buckets
from qdora.plan import Need, Plan, Run
from qdora.simulate import (
    Segment,
    StepTrace,
    cut,
    first_trained,
    head_is_plain,
    simulate_loss,
    simulate_step,
    simulate_updates,
    trained_bytes,
)
from qdora.stream import layer_bytes
from qdora.whole import TrainedWhole

__all__ = ["MemoryModel"]

# Bytes of state a value of other optimizers than ours, by their Hugging Face names; paged ones keep it on the host.
_STATE_BYTES = {
    "adamw_8bit": 2.03,
    "adamw_bnb_8bit": 2.03,
    "paged_adamw_8bit": 0.0,
    "paged_adamw_32bit": 0.0,
    "paged_lion_8bit": 0.0,
    "paged_lion_32bit": 0.0,
    "lion_8bit": 1.02,
    "lion_32bit": 4.0,
    "rmsprop_bnb_8bit": 1.02,
    "ademamix": 12.0,
    "ademamix_8bit": 3.05,
    "paged_ademamix_8bit": 0.0,
    "paged_ademamix_32bit": 0.0,
    "adafactor": 0.1,
    "sgd": 0.0,
}
_FP32_ADAM_BYTES = 8.0


class MemoryModel:
    """Reckons what plans need for one model.

    Args:
        build: makes the model with its adapters on the meta device.
        run: what is reckoned for.

    Raises:
        ConfigError: the model has no decoder layers, none of them trains, or its step does not run.
    """

    def __init__(self, build: Callable[[], Any], run: Run) -> None:
        self._model, self._run = build(), run
        self._layers = decoder_layers(self._model)
        if not any(map(trained_bytes, self._layers)):
            raise ConfigError("cannot reckon a run in which no decoder layer trains")
        for layer in self._layers:
            freeze_dense(layer)  # as streaming does, so that what can be streamed is told by its type
        self._small = deepcopy(self._model)
        cut(self._small)
        with _refusing(self._model):
            self._lean_loss = run.lean_loss and head_is_plain(self._small)
        self._traces: dict[tuple[int, bool], StepTrace] = {}
        self._losses: dict[tuple[int, int], int] = {}

    def need(self, plan: Plan) -> Need:
        """What the plan takes, at its worst moment."""
        copies = self._run.one_place and plan.activation_offloading
        if self._run.one_place:
            plan = replace(plan, activation_offloading=False, embedding_on_host=False)
        trace = self._trace(plan.rows, plan.hold_outputs)
        lasting = self._lasting(plan)
        worst = max(self._moments(trace, plan), key=lambda moment: moment.total)
        parts = {**lasting, "gradients": worst.gradients, "kept layer inputs": worst.inputs, worst.what: worst.own}
        if copies:
            parts["inputs beside their copies"] = 2 * trace.kept_bytes  # the last two, in the same memory
        return Need({name: size for name, size in parts.items() if size}, worst.when, self._waiting(plan, trace))

    def _trace(self, rows: int, holds: bool) -> StepTrace:
        key = (rows, holds)
        if key not in self._traces:
            batch, workspace = self._run.batch(rows), self._run.workspace
            hold_outputs(self._small, self.holding if holds else ())
            with _refusing(self._model):
                self._traces[key] = simulate_step(
                    self._small, batch, workspace, self._run.checkpointing, self._lean_loss
                )
        return self._traces[key]

    @cached_property
    def holding(self) -> tuple[str, ...]:
        """The linears that hold their outputs if a plan says so, see `linears_to_hold`."""
        return linears_to_hold(self._small)

    def _held(self, plan: Plan) -> int:
        """Bytes of the outputs that one layer holds."""
        held, not_held = (self._trace(plan.rows, holds).kept_bytes for holds in (plan.hold_outputs, False))
        return held - not_held

    def _loss(self, rows: int, chunk_bytes: int) -> int:
        key = (rows, chunk_bytes)
        if key not in self._losses:
            positions = rows * (self._run.length - 1)  # the first token of a row is never predicted
            self._losses[key] = simulate_loss(
                self._model.get_output_embeddings(), positions, chunk_bytes, self._run.workspace
            )
        return self._losses[key]

    def _moments(self, trace: StepTrace, plan: Plan) -> Iterator[_Moment]:
        """Every moment of the step that may be its worst, for the whole depth."""
        gradients, traced = self._gradients, len(trace.forward)
        layers, kept, held = len(gradients), trace.kept_bytes, self._held(plan)

        def moment(when: str, what: str, segment: Segment, inputs: tuple[int, int], below: tuple[int, int]) -> _Moment:
            # (in the trace, in the whole model): inputs that are kept, and the layer above which gradients are made
            beside = self._beside_layers if below[1] < layers else 0
            own = segment.peak - inputs[0] * kept - sum(trace.gradient_bytes[below[0] + 1 :]) - beside
            waiting = max(inputs[1] - 2, 0) if plan.activation_offloading else 0
            made = sum(gradients[below[1] + 1 :]) + beside
            if plan.accumulation > 1:  # those of an earlier micro-batch
                made = self._all_gradients
            return _Moment(when, what, own, inputs[1] * kept - waiting * (kept - held), made)

        last, whole = traced - 1, layers - 1
        none = (traced, layers)
        forward, backward = "one layer's forward", "one layer's recompute and gradients"
        yield moment("in the forward of the first layer", forward, trace.forward[0], (0, 0), none)
        yield moment("in the forward of the last layer", forward, trace.forward[last], (last, whole), none)
        loss, logits = trace.loss, "all logits"
        if self._lean_loss:
            loss = Segment(loss.start, loss.start + self._loss(plan.rows, plan.loss_chunk_bytes))
            logits = "loss chunk"
        yield moment("in the loss", logits, loss, (traced, layers), none)
        yield moment("in the backward of the last layer", backward, trace.backward[last], none, (last, whole))
        if traced > 2:
            for number in {1, layers - 2}:
                when = f"in the backward of layer {self._untrained + number + 1} of {len(self._layers)}"
                yield moment(when, backward, trace.backward[1], (2, number + 1), (1, number))
        yield moment("in the backward of the first layer", backward, trace.backward[0], (1, 1), (0, 0))
        workspace = self._update.peak - self._update.start
        yield _Moment("in the optimizer's step", "optimizer's workspace", workspace, 0, self._all_gradients)

    @cached_property
    def _untrained(self) -> int:
        """How many of the first layers no gradient goes through: they keep nothing and hold none."""
        return first_trained(self._model)

    @cached_property
    def _gradients(self) -> list[int]:
        """Of each layer that gradients go through."""
        return [trained_bytes(layer) for layer in self._layers[self._untrained :]]

    @cached_property
    def _beside_layers(self) -> int:
        """Gradients that are there before the layers' own: the head's."""
        head = self._model.get_output_embeddings()
        return 0 if head is None else trained_bytes(head)

    @cached_property
    def _all_gradients(self) -> int:
        return trained_bytes(self._model)

    @cached_property
    def _update(self) -> Segment:
        """The optimizer's step, from the state that it keeps to its peak."""
        if self._run.optim is None:
            groups = parameter_groups(self._model, Rates(learning_rate=0.0))
            return simulate_updates(
                CompensatedAdamW, (bucket for group in groups for bucket in buckets(group["params"]))
            )
        trained = [p for p in self._model.parameters() if p.requires_grad]
        state = int(sum(p.numel() for p in trained) * _STATE_BYTES.get(self._run.optim, _FP32_ADAM_BYTES))
        return Segment(state, state)

    def _lasting(self, plan: Plan) -> dict[str, int]:
        """What is on the device all the time."""
        resident = dict(self._resident)
        if plan.stream_base:
            streamed = sum(self._streamed)
            # Each tensor starts at a round address in a slot, so a slot may be a little more than its layer.
            resident["base weights"] += 2 * max(self._streamed) - streamed + self._rounding
        if plan.embedding_on_host:
            resident["embeddings and head"] -= self._embedding_bytes
        buckets_bytes = self._all_gradients if self._run.replicated else 0
        return {**resident, "optimizer state": self._update.start, "gradient buckets": buckets_bytes}

    def _waiting(self, plan: Plan, trace: StepTrace) -> dict[str, int]:
        """What is on the host."""
        inputs = len(self._gradients) * (trace.kept_bytes - self._held(plan))
        parts = {
            "base weights": sum(self._streamed) if plan.stream_base else 0,
            "embedding": self._embedding_bytes if plan.embedding_on_host else 0,
            "layer inputs": inputs if plan.activation_offloading else 0,
        }
        return {name: size for name, size in parts.items() if size}

    @property
    def can_hold_outputs(self) -> bool:
        """Whether there are outputs that a recompute makes in vain."""
        return self._run.checkpointing and bool(self.holding)

    @property
    def can_offload_inputs(self) -> bool:
        """Whether layer inputs may wait on the host: only if they are what a layer keeps."""
        return self._run.checkpointing and not self._run.one_place

    @property
    def can_spare_embedding(self) -> bool:
        """Whether the input embedding may stay on the host: not if the head is the same weight, or it is trained."""
        return self._embedding_bytes > 0 and not self._run.one_place

    @cached_property
    def _embedding_bytes(self) -> int:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        return 0 if tied or isinstance(embedding, TrainedWhole) else _bytes_of(embedding)

    @cached_property
    def _streamed(self) -> list[int]:
        """Bytes of each layer's slot."""
        return [layer_bytes(weights) for weights in self._base_weights]

    @cached_property
    def _rounding(self) -> int:
        exact = sum(_bytes_of(weight) for weights in self._base_weights for weight in weights)
        return sum(self._streamed) - exact

    @cached_property
    def _base_weights(self) -> list[list[Any]]:
        return [
            [module.base for module in layer.modules() if isinstance(module, DoRALinear | FrozenLinear)]
            for layer in self._layers
        ]

    @cached_property
    def _resident(self) -> dict[str, int]:
        """The whole model on the device, by kind, each storage once."""
        kinds = dict.fromkeys(("base weights", "embeddings and head", "norms and the rest", "adapters"), 0)
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        seen: set[int] = set()
        for module, kind in _kinds(self._model, ends):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    kinds[kind] += tensor.nbytes
        for layer in adapted_linears(self._model).values():
            if layer.use_dora:
                kinds["adapters"] += 12 * layer.out_features  # the row scale and its two companions, fp32
        return kinds


@contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    """A model's own code may fail in any way, over fake tensors or with our linears."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"cannot reckon with {type(model).__name__}, its step does not run: {reason(error)}"
        ) from None


@dataclass(frozen=True)
class _Moment:
    when: str
    what: str
    own: int
    inputs: int
    gradients: int

    @property
    def total(self) -> int:
        return self.own + self.inputs + self.gradients


def _kinds(model: nn.Module, ends: tuple[Any, ...]) -> Iterator[tuple[nn.Module, str]]:
    """Each module and what its own tensors count as."""
    linears = [module for module in model.modules() if isinstance(module, DoRALinear | FrozenLinear)]
    weights: list[Any] = [linear.base for linear in linears]
    bases = {id(part) for weight in weights for part in weight.modules()}
    whole = [module for module in model.modules() if isinstance(module, TrainedWhole)]
    ends = (*ends, *(end.original for end in ends if isinstance(end, TrainedWhole)))
    trained = {id(part) for module in adapted_linears(model).values() for part in module.modules()}
    trained |= {id(module.trained) for module in whole}
    for module in model.modules():
        if id(module) in bases:
            yield module, "base weights"
        elif module in ends:
            yield module, "embeddings and head"
        elif id(module) in trained:
            yield module, "adapters"
        else:
            yield module, "norms and the rest"


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
