"""What a finished run leaves beside its adapter: the loss picture, the log, the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.architecture import is_nf4_checkpoint
from qdora.card import write_card
from qdora.config import ALL_LINEAR
from qdora.corpus import Corpus
from qdora.curves import plot_loss
from qdora.data import marked
from qdora.flags import RunArguments
from qdora.hub import Destination
from qdora.output import replace_bytes
from qdora.planner import asked_plan
from qdora.progress import memory_bytes
from qdora.report import LOG_FILE, REPORT_FILE, Group, RunFacts, write_log, write_report

__all__ = ["Intention", "leave_notes"]

_REPORTED = (
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "seed",
)


@dataclass(frozen=True)
class Intention:
    """How a run was meant, before the trainer's own settings were adapted to it."""

    adapter: str
    settings: dict[str, Any]
    plan: str
    need: str | None
    """What it was reckoned to take, if that was asked for."""
    rounded: bool
    """Whether a 16-bit base is quantized as it loads."""

    @classmethod
    def of(cls, run: RunArguments, training: Any, need: str | None) -> Intention:
        """What is to be told of the run; `run` and `training` as `parse_train` returns them."""
        values = {name: getattr(training, name) for name in _REPORTED}
        settings = {name: getattr(value, "value", value) for name, value in values.items() if value is not None}
        rounded = run.load_in_4bit and not is_nf4_checkpoint(run.model_name_or_path, training.trust_remote_code)
        return cls(
            _adapter_in_words(run),
            settings,
            asked_plan(run, training, training.device.type != "cpu").flags(),
            need,
            rounded,
        )


def leave_notes(
    trainer: Any,
    run: RunArguments,
    meant: Intention,
    corpus: Corpus,
    best_step: int | None,
    remarks: Sequence[str],
    seconds: float,
    began: int,
    destination: Destination | None = None,
) -> None:
    """Write what people read afterwards into the run's directory.

    Args:
        seconds: that this process took.
        began: the step at which it began.
    """
    history, training = trainer.state.log_history, trainer.args
    out = Path(training.output_dir)
    title = f"{Path(run.model_name_or_path).name} on {Path(run.dataset).name}"
    replace_bytes(out / "loss.png", plot_loss(history, title))
    write_log(history, out / LOG_FILE)
    facts = RunFacts(
        base=run.model_name_or_path,
        adapter=meant.adapter,
        output_dir=out,
        dataset=run.dataset,
        data=str(corpus.data),
        evaluation_dataset=corpus.evaluation_name,
        evaluation=None if corpus.evaluation is None else str(corpus.evaluation),
        evaluation_place=_place_of_evaluation(run),
        sample=marked(corpus.data.input_ids[0], corpus.data.labels[0], trainer.processing_class),
        history=history,
        steps=trainer.state.global_step,
        began=began,
        best_step=best_step,
        groups=[_group(group) for group in trainer.optimizer.param_groups],
        settings=meant.settings,
        plan=meant.plan,
        need=meant.need,
        peak_bytes=memory_bytes(training.device),
        device=str(training.device),
        seconds=seconds,
        remarks=remarks,
        rounded=meant.rounded,
        hub_name=None if destination is None else destination.name,
    )
    write_report(facts, out / REPORT_FILE)
    write_card(facts, out)


def _place_of_evaluation(run: RunArguments) -> dict[str, str | None] | None:
    if run.eval_dataset is None:
        return None
    split = None if Path(run.eval_dataset).exists() else run.eval_dataset_split
    return {"dataset": run.eval_dataset, "dataset_split": split, "dataset_config": run.eval_dataset_config}


def _group(group: dict[str, Any]) -> Group:
    values = sum(parameter.numel() for parameter in group["params"])
    return Group(group.get("name", "adapter"), values, group.get("initial_lr", group["lr"]), group["weight_decay"])


def _adapter_in_words(run: RunArguments) -> str:
    method = ("QDoRA" if run.use_dora else "QLoRA") if run.load_in_4bit else ("DoRA" if run.use_dora else "LoRA")
    targets = "all linears" if run.lora_target_modules == [ALL_LINEAR] else ", ".join(run.lora_target_modules)
    stabilized = " (rsLoRA)" if run.use_rslora else ""
    whole = f", {', '.join(run.modules_to_save)} trained whole" if run.modules_to_save else ""
    frozen = "" if run.freeze == "none" else f", {run.freeze} frozen"
    return f"{method} of rank {run.lora_r}, alpha {run.lora_alpha:g}{stabilized}, on {targets}{whole}{frozen}"
