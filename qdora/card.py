"""The model card beside an adapter: README.md, as the Hub and people read it.

What stands in its head is what is true of the adapter wherever it goes: a base or a data set is named there only if it
is on the Hub, and a licence only if the base brings one. A README.md that somebody else wrote is left alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qdora.curves import loss_series
from qdora.output import replace_text
from qdora.report import RunFacts

__all__ = ["CARD_FILE", "write_card"]

CARD_FILE = "README.md"
_MARK = "qdora"
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")


def write_card(facts: RunFacts, directory: Path) -> None:
    """Write the card into an adapter's directory, whole or not at all."""
    path = directory / CARD_FILE
    tags = head_of(path).get("tags")
    if path.is_file() and not (isinstance(tags, list) and _MARK in tags):
        return
    head = yaml.safe_dump(_head(facts, directory), sort_keys=False, allow_unicode=True)
    replace_text(path, f"---\n{head}---\n\n{_body(facts, directory)}\n")


def head_of(path: Path) -> dict[str, Any]:
    """The metadata of a card; nothing if there is no card, or none that can be read."""
    try:
        found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
        head = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def _head(facts: RunFacts, directory: Path) -> dict[str, Any]:
    base = facts.base if _is_on_the_hub(facts.base) else None
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base:
        head["base_model"] = base
    tags = [_MARK, "dora" if "DoRA" in facts.adapter else "lora", "sft"]
    head["tags"] = [*tags, *([f"base_model:adapter:{base}"] if base else [])]
    if _is_on_the_hub(facts.dataset):
        head["datasets"] = [facts.dataset]
    license_of_base = head_of(Path(facts.base) / CARD_FILE).get("license")
    if isinstance(license_of_base, str):
        head["license"] = license_of_base
    figures = _figures(facts)
    if figures:
        measured = [{"name": name, "type": kind, "value": value} for name, kind, value in figures]
        on = Path(facts.evaluation_dataset or facts.dataset).name
        task = {"task": {"type": "text-generation"}, "dataset": {"name": on, "type": on}, "metrics": measured}
        head["model-index"] = [{"name": _name(facts, directory), "results": [task]}]
    return head


def _body(facts: RunFacts, directory: Path) -> str:
    _, losses = loss_series(facts.history, "loss")
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})"
        if _is_on_the_hub(facts.base)
        else f"`{_last(facts.base)}`"
    )
    lines = [
        f"# {_name(facts, directory)}",
        "",
        f"{facts.adapter}, trained on `{_last(facts.dataset)}` ({facts.data}) over {base}, with qdora.",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {facts.steps} |",
    ]
    if losses:
        lines.append(f"| training loss | {losses[0]:.4f} → {losses[-1]:.4f} |")
    lines += [f"| {name} | {value:.4f} |" for name, _, value in _figures(facts)]
    lines += [f"| {name} | {value} |" for name, value in facts.settings.items()]
    return "\n".join([*lines, "", _usage(facts, directory)])


def _usage(facts: RunFacts, directory: Path) -> str:
    name, base = _name(facts, directory), facts.base if _is_on_the_hub(facts.base) else _last(facts.base)
    quantize = [
        "# the base in 4 bits, as it was trained on",
        'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    ]
    how = ", quantization_config=nf4" if facts.rounded else ""
    return "\n".join(
        [
            "```python",
            "from peft import PeftModel",
            f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if facts.rounded else ''}",
            "",
            *(quantize if facts.rounded else []),
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{how})',
            f'model = PeftModel.from_pretrained(base, "{name}")',
            "```",
            "",
            "```bash",
            f"qdora chat {base} --adapter {name}",
            f"qdora merge {base} {name} merged",
            "```",
        ]
    )


def _name(facts: RunFacts, directory: Path) -> str:
    return facts.hub_name or directory.resolve().name


def _figures(facts: RunFacts) -> list[tuple[str, str, float]]:
    """(name, the Hub's name of its kind, value) of what was measured on other rows, of the adapter that was kept."""
    entries = [entry for entry in facts.history if "eval_loss" in entry]
    kept = [entry for entry in entries if entry.get("step") == facts.best_step] or entries
    if not kept:
        return []
    known = (("eval_loss", "loss"), ("eval_perplexity", "perplexity"), ("eval_exact_match", "exact_match"))
    named = [(key.removeprefix("eval_").replace("_", " "), kind, kept[-1].get(key)) for key, kind in known]
    return [(f"evaluation {name}", kind, round(float(value), 6)) for name, kind, value in named if value is not None]


def _is_on_the_hub(name: str) -> bool:
    return (
        not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(_FORMATS)
    )


def _last(name: str) -> str:
    return name if _is_on_the_hub(name) else Path(name).name
