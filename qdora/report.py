"""What is left beside an adapter for people to read: a report in Markdown, and every log entry as CSV."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.curves import loss_series
from qdora.output import replace_text
from qdora.shards import format_bytes

__all__ = ["LOG_FILE", "REPORT_FILE", "Group", "RunFacts", "write_log", "write_report"]

REPORT_FILE, LOG_FILE = "report.md", "log.csv"
_FIRST_COLUMNS = ("step", "epoch", "loss", "eval_loss", "eval_perplexity", "eval_exact_match", "learning_rate")
_SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class Group:
    """One of the optimizer's groups."""

    name: str
    values: int
    learning_rate: float
    """At its highest."""
    weight_decay: float


@dataclass(frozen=True)
class RunFacts:
    """What a finished run was, and what came of it."""

    base: str
    adapter: str
    """In words: method, rank, alpha, targets."""
    output_dir: Path
    dataset: str
    data: str
    """Counts of rows and tokens, in words."""
    evaluation_dataset: str | None
    evaluation: str | None
    evaluation_place: Mapping[str, str | None] | None
    """Where these rows are, as flags of `qdora evaluate`; None if they were kept back from those of the training."""
    sample: str
    """A row as the model saw it, with marks around what carried loss."""
    history: Sequence[Mapping[str, Any]]
    steps: int
    began: int
    """So many of them had been made when this process began."""
    best_step: int | None
    """Of the checkpoint that was kept, if evaluations chose it."""
    groups: Sequence[Group]
    settings: Mapping[str, Any]
    plan: str
    """As flags."""
    need: str | None
    """What it was reckoned to take, part by part, if that was asked for."""
    peak_bytes: int
    device: str
    seconds: float
    remarks: Sequence[str] = ()
    """What went otherwise than it should."""
    rounded: bool = False
    """Whether the base is a 16-bit model that was quantized as it loaded."""
    hub_name: str | None = None
    """`owner/name` of the repository that the adapter goes to."""


def write_log(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every entry of a trainer's log history as a line of CSV, one column a name."""
    names = dict.fromkeys([name for name in _FIRST_COLUMNS if any(name in entry for entry in history)])
    names |= dict.fromkeys(name for entry in history for name in entry)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_text(path, text.getvalue())


def write_report(facts: RunFacts, path: Path) -> None:
    """The run as a page of Markdown; the loss picture is expected beside it."""
    sections = [_title(facts), _curves(facts), _data(facts), _settings(facts), _memory(facts), _next(facts)]
    replace_text(path, "\n\n".join(sections) + "\n")


def _title(facts: RunFacts) -> str:
    _, losses = loss_series(facts.history, "loss")
    loss = f"training loss {losses[0]:.4f} → {losses[-1]:.4f}, " if losses else ""
    made = f", the last {facts.steps - facts.began} of them" if facts.began else ""
    title = (
        f"# {Path(facts.base).name} on {Path(facts.dataset).name}\n\n"
        f"{facts.adapter}; {loss}{facts.steps} steps{made} in {_duration(facts.seconds)} on {facts.device}."
    )
    return "\n\n".join([title, *(f"**{remark[:1].upper()}{remark[1:]}.**" for remark in facts.remarks)])


def _curves(facts: RunFacts) -> str:
    lines = ["## Curves", "", "![loss over the steps](loss.png)", "", f"Every entry of the log: `{LOG_FILE}`."]
    entries = [entry for entry in facts.history if "eval_loss" in entry]
    if entries:
        with_match = any("eval_exact_match" in entry for entry in entries)
        lines += ["", "| step | evaluation loss | perplexity |" + (" exact match |" if with_match else "")]
        lines.append("|---|---|---|" + ("---|" if with_match else ""))
        for entry in entries:
            kept = " (kept)" if entry["step"] == facts.best_step else ""
            perplexity = entry.get("eval_perplexity", float("nan"))
            row = f"| {entry['step']}{kept} | {entry['eval_loss']:.4f} | {perplexity:.3f} |"
            lines.append(row + (f" {entry.get('eval_exact_match', float('nan')):.1%} |" if with_match else ""))
    return "\n".join(lines)


def _data(facts: RunFacts) -> str:
    lines = ["## What it learned from", "", f"- `{facts.dataset}`: {facts.data}"]
    if facts.evaluation is not None:
        lines.append(f"- to evaluate on, `{facts.evaluation_dataset}`: {facts.evaluation}")
    sample = facts.sample
    if len(sample) > _SAMPLE_CHARACTERS:
        sample = sample[:_SAMPLE_CHARACTERS] + " …"
    lines += ["", "The first row, as the model saw it; what stands between ⟦ and ⟧ carried loss:", ""]
    fence = _fence(sample)
    return "\n".join([*lines, f"{fence}text", sample, fence])


def _fence(text: str) -> str:
    """More backticks than the text has in a row."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    return "`" * max(3, longest + 1)


def _settings(facts: RunFacts) -> str:
    lines = ["## Settings", "", "| part | values | highest learning rate | weight decay |", "|---|---|---|---|"]
    for group in facts.groups:
        lines.append(f"| {group.name} | {group.values:,} | {group.learning_rate:g} | {group.weight_decay:g} |")
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts.settings.items())])


def _memory(facts: RunFacts) -> str:
    where = "held by the process at the end" if facts.device == "cpu" else "allocated at the most"
    lines = ["## Memory", "", f"- {format_bytes(facts.peak_bytes)} {where}", f"- plan: `{facts.plan}`"]
    if facts.need is not None:
        lines += ["", "Reckoned before:", "", "```text", facts.need, "```"]
    return "\n".join(lines)


def _next(facts: RunFacts) -> str:
    base, out = shlex.quote(facts.base), shlex.quote(str(facts.output_dir))
    commands = [
        f"qdora evaluate {base} --adapter {out} {_rows_to_evaluate_on(facts)}",
        f"qdora inspect {out}",
        f"qdora chat {base} --adapter {out} --compare",
        f"qdora merge {base} {out} MERGED",
    ]
    return "\n".join(["## What next", "", "```bash", *commands, "```"])


def _rows_to_evaluate_on(facts: RunFacts) -> str:
    """As flags. Those that were trained on say nothing, and rows that were kept back lie among them."""
    flags = facts.evaluation_place or {"dataset": "NEW_ROWS"}
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in flags.items() if value is not None)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
