"""The card says what is true wherever the adapter goes, and replaces no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from qdora.card import CARD_FILE, head_of, write_card
from tests.test_report import FACTS


def test_a_base_and_data_of_the_hub_are_named(tmp_path: Path) -> None:
    history = [*FACTS.history, {"eval_loss": 0.5, "eval_exact_match": 0.9, "step": 1}, {"eval_loss": 0.7, "step": 2}]
    facts = replace(FACTS, base="owner/base", dataset="owner/data", history=history, best_step=1)
    write_card(facts, tmp_path)
    head = head_of(tmp_path / CARD_FILE)
    assert head["library_name"] == "peft"
    assert head["base_model"] == "owner/base"
    assert head["datasets"] == ["owner/data"]
    assert head["tags"] == ["qdora", "dora", "sft", "base_model:adapter:owner/base"]
    assert "license" not in head
    (result,) = head["model-index"][0]["results"]
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("loss", 0.5), ("exact_match", 0.9)]
    page = (tmp_path / CARD_FILE).read_text()
    for part in (
        "[owner/base](https://huggingface.co/owner/base)",
        "| training loss | 2.0000 → 1.0000 |",
        "| evaluation exact match | 0.9000 |",
        "| seed | 42 |",
        'from_pretrained("owner/base")',
        f'from_pretrained(base, "{tmp_path.name}")',
    ):
        assert part in page, part


def test_places_on_this_machine_are_not(tmp_path: Path) -> None:
    base = tmp_path / "private" / "base-nf4"
    base.mkdir(parents=True)
    (base / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n# base\n")
    (tmp_path / "out").mkdir()
    write_card(replace(FACTS, base=str(base), dataset=str(tmp_path / "private" / "notes.jsonl")), tmp_path / "out")
    head = head_of(tmp_path / "out" / CARD_FILE)
    assert head["license"] == "apache-2.0"
    assert not {"base_model", "datasets", "model-index"} & head.keys()
    page = (tmp_path / "out" / CARD_FILE).read_text()
    assert "private" not in page
    assert "`base-nf4`" in page


def test_ours_is_replaced_and_nobody_else_s(tmp_path: Path) -> None:
    write_card(FACTS, tmp_path)
    write_card(replace(FACTS, steps=77), tmp_path)
    assert "| steps | 77 |" in (tmp_path / CARD_FILE).read_text()
    for other in (
        "# mine\n",
        "---\nupdated: 2024-02-30\n---\n",
        "---\ntags: 5\n---\n",
        "---\ntags: not-qdora-made\n---\n",
        f"---\na: {'[' * 5000}\n---\n",
        "---\ntags: [mine]\n---\n",
        "---\n: [\n---\n",
        yaml.safe_dump({"tags": "qdora"}),
    ):
        (tmp_path / CARD_FILE).write_text(other)
        write_card(FACTS, tmp_path)
        assert (tmp_path / CARD_FILE).read_text() == other


def test_a_base_that_was_rounded_as_it_loaded_is_loaded_so_again(tmp_path: Path) -> None:
    write_card(replace(FACTS, rounded=True, hub_name="ada/notes"), tmp_path)
    page = (tmp_path / CARD_FILE).read_text()
    code = page.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "quantization_config=nf4" in code
    assert 'from_pretrained(base, "ada/notes")' in code
    assert "quantization_config" not in (write_card(FACTS, tmp_path) or (tmp_path / CARD_FILE).read_text())
