"""The fastest way to make a training run fit.

Plans are tried in the order of what they cost: as asked, with outputs held unless that was decided; smaller loss
chunks; no outputs held; layer inputs on the host; the embedding on the host; smaller micro-batches, more of them a
step; and at last the base weights streamed from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qdora.architecture import hollow_model
from qdora.arguments import adapter_config
from qdora.arithmetic import training_dtype
from qdora.distributed import processes
from qdora.errors import ConfigError
from qdora.flags import OWN_OPTIMIZERS, RunArguments, loss_is_plain
from qdora.groups import freeze_part
from qdora.memory import MemoryModel
from qdora.plan import Need, Plan, Run
from qdora.shards import format_bytes, parse_size
from qdora.workspace import ACCELERATOR, CPU

__all__ = ["adopt", "asked_plan", "choose", "hollow_of", "memory_model", "unfragmented", "usable_bytes"]

# The first costs little. With the other a large head's weight is read for a few positions at a time.
_SMALLER_CHUNK, _SMALLEST_CHUNK = 16 * 2**20, 4 * 2**20
# Reckoned, not measured: the driver's context and the libraries' workspaces, and what fragmentation takes.
_DRIVER_BYTES = 500 * 10**6
_FRAGMENTED_SHARE = 0.03


def hollow_of(run: RunArguments, training: Any) -> Any:
    """The model that these flags train, on the meta device, with its adapters. Raises as `memory_model`."""
    assert run.dtype is not None, "settled by whoever knows the device"
    model = hollow_model(
        run.model_name_or_path,
        adapter_config(run),
        dtype=run.dtype,
        load_in_4bit=run.load_in_4bit,
        trust_remote_code=training.trust_remote_code,
    )
    freeze_part(model, run.freeze)
    return model


def memory_model(run: RunArguments, training: Any, on_accelerator: bool) -> MemoryModel:
    """Reckons for the run that the flags of `qdora train` describe.

    Args:
        run, training: as `parse_train` returns them.
        on_accelerator: rather than on the CPU.

    Raises:
        CheckpointError: no causal language model.
        ConfigError: a flag is wrong.
    """
    if training.max_length is None:
        raise ConfigError("--max_length is off: how long the rows may get must be known to reckon with them")
    kinds = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # by transformers' release
    if any((getattr(training, kind, None) or {}).get("every_n_layers", 1) != 1 for kind in kinds):
        raise ConfigError("memory is reckoned with every layer recomputed; leave every_n_layers out")
    settled = replace(run, dtype=run.dtype or training_dtype(torch.device("cuda" if on_accelerator else "cpu")))
    return MemoryModel(
        lambda: hollow_of(settled, training),
        Run(
            length=training.max_length,
            workspace=ACCELERATOR if on_accelerator else CPU,
            one_place=not on_accelerator,
            optim=None if training.optim in OWN_OPTIMIZERS else str(getattr(training.optim, "value", training.optim)),
            checkpointing=training.gradient_checkpointing,
            replicated=processes() > 1,
            lean_loss=loss_is_plain(training),
            filled=training.packing,
            # As TRL does: these ways of packing, and batches without padding, go through attention as one row.
            flattened=training.padding_free or (training.packing and training.packing_strategy != "wrapped"),
        ),
    )


def asked_plan(run: RunArguments, training: Any, on_accelerator: bool) -> Plan:
    """The run as its flags say."""
    size, workspace = run.loss_chunk_size, ACCELERATOR if on_accelerator else CPU
    return Plan(
        rows=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        loss_chunk_bytes=workspace.logits_bytes if size is None else parse_size(size),
        hold_outputs=bool(run.hold_outputs),
        activation_offloading=training.activation_offloading,
        embedding_on_host=run.embedding_on_host,
        stream_base=run.stream_base,
    )


def adopt(plan: Plan, run: RunArguments, training: Any) -> None:
    """Let the flags say what the plan says, in place."""
    training.per_device_train_batch_size = plan.rows
    training.gradient_accumulation_steps = plan.accumulation
    # Evaluation is not reckoned: as many rows without gradients take less than a step does.
    training.per_device_eval_batch_size = min(training.per_device_eval_batch_size, plan.rows)
    training.activation_offloading = plan.activation_offloading
    run.loss_chunk_size = str(plan.loss_chunk_bytes)
    run.hold_outputs = plan.hold_outputs
    run.embedding_on_host, run.stream_base = plan.embedding_on_host, plan.stream_base


def usable_bytes(memory: str, on_accelerator: bool) -> int:
    """What may be allocated of a device's memory; an accelerator's driver and fragmentation take a share.

    Raises:
        ConfigError: not a size, or one too small for anything.
    """
    total = parse_size(memory)
    usable = unfragmented(total, on_accelerator) - (_DRIVER_BYTES if on_accelerator else 0)
    if usable <= 0:
        raise ConfigError(f"--memory {memory} leaves nothing beside the {format_bytes(_DRIVER_BYTES)} of the driver")
    return usable


def unfragmented(free: int, on_accelerator: bool) -> int:
    """What may be allocated of bytes that are free, the driver's share not among them."""
    return int(free * (1 - _FRAGMENTED_SHARE)) if on_accelerator else free


def choose(reckoned: MemoryModel, asked: Plan, limit_bytes: int, may_hold_outputs: bool = False) -> tuple[Plan, Need]:
    """The fastest plan that fits.

    Args:
        asked: the run as its flags say.
        limit_bytes: what may be allocated on the device.
        may_hold_outputs: whether to, if the model is one that it makes faster, although it was not asked for.

    Raises:
        ConfigError: nothing fits; it says what the least would be.
    """
    if may_hold_outputs and reckoned.can_hold_outputs:
        asked = replace(asked, hold_outputs=True)
    least: tuple[Plan, Need] | None = None
    for plan in _plans(asked, reckoned):
        need = reckoned.need(plan)
        if need.device_bytes <= limit_bytes:
            plan = _relaxed(reckoned, plan, asked, limit_bytes)
            return plan, reckoned.need(plan)
        if least is None or need.device_bytes < least[1].device_bytes:
            least = plan, need
    assert least is not None
    raise ConfigError(
        f"nothing fits in {format_bytes(limit_bytes)}: the least is {format_bytes(least[1].device_bytes)}, by "
        f"{least[0].flags()}; lower --max_length or --lora_r, or take a smaller model"
    )


def _relaxed(reckoned: MemoryModel, plan: Plan, asked: Plan, limit_bytes: int) -> Plan:
    """The plan without those of its savings that turn out not to be needed."""
    for name in ("loss_chunk_bytes", "hold_outputs", "activation_offloading", "embedding_on_host"):
        without = replace(plan, **{name: getattr(asked, name)})
        if reckoned.need(without).device_bytes <= limit_bytes:
            plan = without
    return plan


def _plans(asked: Plan, reckoned: MemoryModel) -> Iterator[Plan]:
    """From the fastest to the leanest."""
    for streams in (False, True) if not asked.stream_base else (True,):
        rows, total = asked.rows, asked.rows * asked.accumulation
        while True:
            plan = replace(asked, rows=rows, accumulation=total // rows, stream_base=streams)
            yield from _same_batch(plan, reckoned)
            if rows == 1:
                break
            # at most half as many, and the same number in all
            rows = next(fewer for fewer in range(rows // 2, 0, -1) if total % fewer == 0)


def _same_batch(plan: Plan, reckoned: MemoryModel) -> Iterator[Plan]:
    yield plan
    if plan.loss_chunk_bytes > _SMALLER_CHUNK:
        plan = replace(plan, loss_chunk_bytes=_SMALLER_CHUNK)
        yield plan
    if plan.hold_outputs:
        plan = replace(plan, hold_outputs=False)
        yield plan
    if reckoned.can_offload_inputs and not plan.activation_offloading:
        plan = replace(plan, activation_offloading=True)
        yield plan
    if reckoned.can_spare_embedding and not plan.embedding_on_host:
        plan = replace(plan, embedding_on_host=True)
        yield plan
    if plan.loss_chunk_bytes > _SMALLEST_CHUNK:
        yield replace(plan, loss_chunk_bytes=_SMALLEST_CHUNK)
