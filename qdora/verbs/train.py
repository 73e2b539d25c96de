"""`qdora train`: an NF4 base, a data file, and out comes an adapter.

The training itself is TRL's: schedules, accumulation weighted by tokens, logging, evaluation, trackers, resuming. Here
is what it must be told: the model and the data; and what may be wrong is found before the long work, not after it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import enable_full_determinism, set_seed
from transformers.utils import logging

from qdora.arguments import adapter_config, flags_of, parse_train
from qdora.arithmetic import training_dtype
from qdora.assembly import build_trainer
from qdora.callbacks import StopWhenAsked
from qdora.checkpoint import load_adapter
from qdora.config import AdapterConfig
from qdora.corpus import Corpus, load_corpus
from qdora.course import run_training
from qdora.curves import loss_series
from qdora.distributed import bar, is_main, processes, say
from qdora.errors import CheckpointError, NumericsError
from qdora.exhausted import Headroom, memory_explained
from qdora.flags import RunArguments
from qdora.groups import freeze_part
from qdora.holding import linears_to_hold
from qdora.hub import take_destination
from qdora.inject import hold_outputs
from qdora.listeners import outlasting_listeners
from qdora.lock import locked
from qdora.model import load_model, trainable_parameters
from qdora.movement import MovementWatch
from qdora.notes import Intention, leave_notes
from qdora.output import writing
from qdora.planner import adopt, asked_plan, choose, hollow_of, memory_model, usable_bytes
from qdora.preflight import check_original, check_place, check_trackers
from qdora.report import LOG_FILE, REPORT_FILE
from qdora.residual import begin_with_residual
from qdora.resume import check_epochs, start
from qdora.runrecord import RecordKeeper, Start, begin_record, finish_record
from qdora.sharding import Sharding, take_sharding
from qdora.signals import StopRequest
from qdora.together import check_sharded
from qdora.tokenizer import check_ids, load_tokenizer, use_template

__all__ = ["TrainReport", "train", "train_from_arguments"]


@dataclass
class TrainReport:
    """What `train` did."""

    base: str
    output_dir: Path
    steps: int
    first_loss: float
    """NaN if no step was applied."""
    last_loss: float
    eval_loss: float | None
    """Of the adapter that was kept."""
    best_step: int | None
    """When that was, if evaluations chose it."""
    trained_values: int
    data: str
    remarks: tuple[str, ...] = ()
    """What went otherwise than it should: steps left out, parts that stood still."""

    def __str__(self) -> str:
        known = math.isfinite(self.last_loss)  # it is not if no step was applied
        loss = f"loss {self.first_loss:.4f} → {self.last_loss:.4f}" if known else "no loss"
        evaluation = "" if self.eval_loss is None else f", evaluation loss {self.eval_loss:.4f}"
        kept = "" if self.best_step is None else f" (the best, of step {self.best_step}, was kept)"
        return (
            f"{loss} in {self.steps} steps{evaluation}{kept}; {self.trained_values:,} values trained\n"
            f"{''.join(remark + chr(10) for remark in self.remarks)}"
            f"adapter in {self.output_dir}; beside it {REPORT_FILE}, {LOG_FILE} and loss.png"
        )


def train(config: str | Path | None = None, **flags: Any) -> TrainReport | None:
    """Train an adapter.

    Args:
        config: a YAML file of flags.
        flags: by the names of the command line (`learning_rate=1e-4`, `lora_target_modules=["q_proj"]`); they override
            the file.

    Returns:
        The report; None after a dry run.

    Raises:
        CheckpointError, ConfigError, DataError: the model, a flag or the data is wrong; nothing was trained.
        NumericsError: a loss, a gradient or a trained value is not finite; no such adapter was written.
        OutputError: the output cannot be written.
        QDoRAError: memory ran out, or the adapter could not be uploaded.
        Stopped: SIGINT or SIGTERM came; the step was ended and saved.
    """
    return train_from_arguments([*([] if config is None else [str(config)]), *flags_of(flags)])


def train_from_arguments(arguments: Sequence[str]) -> TrainReport | None:
    """`train`, given a command line."""
    started = time.perf_counter()
    if not is_main():
        _hush()
    run, training = parse_train(arguments)
    training.log_level_replica = "error"
    output_dir = Path(training.output_dir)
    check_place(output_dir)
    with outlasting_listeners(), ExitStack() as stack:
        if is_main() and not run.dry_run:
            with writing(output_dir):
                stack.enter_context(locked(output_dir / ".qdora.lock", output_dir))
        return _train(run, training, output_dir, started)


def _train(run: RunArguments, training: Any, output_dir: Path, started: float) -> TrainReport | None:
    sharding = take_sharding(training)
    _settle_dtype(run, training)  # the record below holds it: a run that goes on elsewhere must not compute in another
    check_trackers(training.report_to)
    beginning = Start({}) if run.dry_run else start(run, training, output_dir)
    adapter = adapter_config(run)
    if sharding is not None:
        check_sharded(run, training)
    check_original(run, training.trust_remote_code)
    _use_one_device(training)
    need, holding = _plan(run, training) if run.memory is not None or run.dry_run else (None, None)
    if run.dry_run:
        return None
    tokenizer = load_tokenizer(run.model_name_or_path, training.trust_remote_code)
    use_template(tokenizer, training.chat_template_path)
    training.chat_template_path = None  # TRL would read it once more
    corpus = load_corpus(run, training, tokenizer)
    destination = take_destination(training)
    headroom = Headroom(run, training, sharding is not None)
    _make_repeatable(training)
    with memory_explained("while the model was loaded", headroom):
        model = _load(run, training, adapter, sharding)
    check_ids(model, tokenizer, corpus.ids(tokenizer.pad_token_id))
    if beginning.checkpoint is not None:
        _check_fits(model, beginning.checkpoint)
    freeze_part(model, run.freeze)
    if run.hold_outputs:
        _hold(model, run, training, holding)
    say(f"training {trainable_parameters(model):,} values of {run.model_name_or_path} on {_places(training, sharding)}")
    meant = Intention.of(run, training, need)
    request = StopRequest()
    with memory_explained("before the first step", headroom):
        trainer = build_trainer(model, tokenizer, training, corpus, run, sharding)
    check_epochs(beginning, training, len(trainer.train_dataset))
    began = beginning.step  # its checkpoint may be gone at the end
    trainer.add_callback(RecordKeeper(beginning))
    trainer.add_callback(StopWhenAsked(request))  # the last, for it ends the run before those that come after it
    trainer.accelerator.wait_for_everyone()  # all have seen the directory as it was
    if is_main():
        with writing(output_dir):
            begin_record(beginning, output_dir)
    with request:
        run_training(trainer, beginning, headroom)
    report = _finish(trainer, run, corpus, output_dir)
    if is_main():
        with writing(output_dir):
            leave_notes(
                trainer,
                run,
                meant,
                corpus,
                report.best_step,
                report.remarks,
                time.perf_counter() - started,
                began,
                destination,
            )
            finish_record(beginning, output_dir)
    if destination is not None:
        say(f"uploaded to {destination.publish(output_dir)}")
    return report


def _settle_dtype(run: RunArguments, training: Any) -> None:
    """Compute in what is fast here, unless told otherwise; say so if that is not bfloat16, or what is asked is slow.

    Say too in what the adapter is trained, where that is not the usual.
    """
    usual = training_dtype(training.device)
    asked = "bfloat16" if training.bf16 else "float16" if training.fp16 else run.dtype
    if usual == "float32" and asked is None:
        say("this CPU is slow in bfloat16: computing in float32")
    elif usual == "float32" and asked != usual:
        say(f"this CPU is slow in {asked}: --dtype float32, without --bf16 and --fp16, takes a fraction of the time")
    if training.fp16:
        say(f"--fp16 scales the loss: the adapter is trained in {run.adapter_dtype}")
    run.dtype = run.dtype or usual


def _hush() -> None:
    """What libraries log and warn of is said by the main process; in the others it would be repeated."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _plan(run: RunArguments, training: Any) -> tuple[str, tuple[str, ...]]:
    """Make the run fit in what it was given, and say what it takes.

    Returns:
        What it takes, in words; the linears that hold their outputs.
    """
    on_accelerator = training.device.type != "cpu"
    reckoned, plan = memory_model(run, training, on_accelerator), asked_plan(run, training, on_accelerator)
    if run.memory is None:
        need = reckoned.need(plan)
    else:
        plan, need = choose(reckoned, plan, usable_bytes(run.memory, on_accelerator), run.hold_outputs is None)
        adopt(plan, run, training)
    say(f"plan: {plan.flags()}\n{need}")
    return str(need), reckoned.holding if plan.hold_outputs else ()


def _make_repeatable(training: Any) -> None:
    """Seed everything that is drawn from here on: fresh adapters, dropout, the order of rows.

    cuBLAS reads how it must work when it is first used, so `--full_determinism` is settled before there is a model; the
    trainer would do it after.
    """
    (enable_full_determinism if training.full_determinism else set_seed)(training.seed)


def _load(run: RunArguments, training: Any, adapter: AdapterConfig, sharding: Sharding | None) -> Any:
    model = load_model(
        run.model_name_or_path,
        adapter,
        dtype=run.dtype,
        device=training.device,
        load_in_4bit=run.load_in_4bit,
        stream_base=run.stream_base,
        embedding_on_host=run.embedding_on_host,
        sharding=sharding,
        trust_remote_code=training.trust_remote_code,
    )
    if run.init_lora_weights == "loftq":
        original = run.original_model_name_or_path or run.model_name_or_path
        say(str(begin_with_residual(model, original, training.trust_remote_code, bar("loftq", "linears"))))
    return model


def _check_fits(model: Any, checkpoint: str) -> None:
    """Take the checkpoint's adapter over, which the trainer does once more: what does not fit shows before the record
    of this run stands in the place of that one's."""
    try:
        load_adapter(model, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot go on from {checkpoint}: {error}; keep the base and the flags of the adapter that it has"
        ) from None


def _hold(model: Any, run: RunArguments, training: Any, holding: tuple[str, ...] | None) -> None:
    """Let the linears in which a recompute ends hold their outputs, and say which they are.

    Args:
        holding: those of the plan, if there is one.
    """
    names = linears_to_hold(hollow_of(run, training)) if holding is None else holding
    hold_outputs(model, names)
    say(f"holding the outputs of {', '.join(names) or 'no linear: none of this model is computed twice in vain'}")


def _use_one_device(training: Any) -> None:
    """One process trains on one device; transformers would copy the model to every one that it sees."""
    if training.n_gpu > 1:
        say(f"using one of {training.n_gpu} devices; `torchrun --nproc_per_node {training.n_gpu} -m qdora` uses all")
        training._n_gpu = 1


def _places(training: Any, sharding: Sharding | None) -> str:
    if processes() == 1:
        return str(training.device)
    how = "each with the whole model" if sharding is None else "the model sharded over them (FSDP2)"
    return f"{processes()} processes ({training.device.type}), {how}"


def _finish(trainer: Any, run: RunArguments, corpus: Corpus, output_dir: Path) -> TrainReport:
    history = trainer.state.log_history
    _, losses = loss_series(history, "loss")
    if not losses:
        _, losses = loss_series(history, "train_loss")
    _, eval_losses = loss_series(history, "eval_loss")
    if not all(map(math.isfinite, [*losses, *eval_losses])):
        raise NumericsError(f"the loss stopped being finite; no adapter was written to {output_dir}, lower the rate")
    trainer.save_all()
    best_step = _best_step(trainer)
    kept = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == best_step]
    return TrainReport(
        base=run.model_name_or_path,
        output_dir=output_dir,
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else math.nan,
        last_loss=losses[-1] if losses else math.nan,
        eval_loss=[*eval_losses, *kept][-1] if eval_losses else None,
        best_step=best_step,
        trained_values=trainable_parameters(trainer.model),
        data=str(corpus.data),
        remarks=_remarks(trainer),
    )


def _remarks(trainer: Any) -> tuple[str, ...]:
    watches = [trainer.guard, *(c for c in trainer.callback_handler.callbacks if isinstance(c, MovementWatch))]
    return tuple(remark for watch in watches if (remark := watch.remark()) is not None)


def _best_step(trainer: Any) -> int | None:
    checkpoint = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return None if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])
