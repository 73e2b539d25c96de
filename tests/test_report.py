"""The report says what a reader will ask."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from qdora.arguments import parse_train
from qdora.notes import _place_of_evaluation
from qdora.parsers import parse
from qdora.report import Group, RunFacts, write_log, write_report
from tests.test_train import quick

FACTS = RunFacts(
    base="base-nf4",
    adapter="QDoRA of rank 16",
    output_dir=Path("out"),
    dataset="notes.jsonl",
    data="100 rows; 3 answers cut at max_length",
    evaluation_dataset=None,
    evaluation=None,
    evaluation_place=None,
    sample="Q: ```x``` ⟦A⟧",
    history=[{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2, "note": "a,b"}],
    steps=2,
    began=0,
    best_step=None,
    groups=[Group("direction", 1000, 1e-3, 0.0)],
    settings={"seed": 42},
    plan="--per_device_train_batch_size 4",
    need="  peak  1 GB",
    peak_bytes=2 * 10**9,
    device="cuda:0",
    seconds=7300.0,
)


def test_the_page(tmp_path: Path) -> None:
    write_report(FACTS, tmp_path / "r.md")
    page = (tmp_path / "r.md").read_text()
    for part in (
        "# base-nf4 on notes.jsonl",
        "training loss 2.0000 → 1.0000, 2 steps in 2.0 hours on cuda:0",
        "3 answers cut at max_length",
        "````text\nQ: ```x``` ⟦A⟧\n````",
        "| direction | 1,000 | 0.001 | 0 |",
        "- seed: 42",
        "2 GB allocated at the most",
        "--per_device_train_batch_size 4",
        "peak  1 GB",
        "qdora evaluate base-nf4 --adapter out --dataset NEW_ROWS",
        "qdora merge base-nf4 out MERGED",
    ):
        assert part in page, part
    assert "evaluation loss" not in page


def test_a_run_that_went_on_says_how_many_steps_it_made(tmp_path: Path) -> None:
    write_report(replace(FACTS, steps=7, began=4), tmp_path / "r.md")
    assert "7 steps, the last 3 of them in 2.0 hours on cuda:0" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--validation_split_percentage", "10"], "--dataset NEW_ROWS"),
        (["--eval_dataset", "my rows.jsonl"], "--dataset 'my rows.jsonl'"),
        (
            ["--eval_dataset", "owner/data", "--eval_dataset_split", "validation", "--eval_dataset_config", "de"],
            "--dataset owner/data --dataset_split validation --dataset_config de",
        ),
    ],
)
def test_the_command_that_evaluates(
    flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows that say something: not those that were trained on, and no split of a file."""
    monkeypatch.chdir(tmp_path)
    Path("my rows.jsonl").touch()
    needed = ["--model_name_or_path", "my base", "--dataset", "d.jsonl", "--output_dir", "out"]
    run, _ = parse_train([*needed, *flags])
    place = _place_of_evaluation(run)
    write_report(replace(FACTS, base="my base", output_dir=Path("my out"), evaluation_place=place), Path("r.md"))
    line = next(line for line in Path("r.md").read_text().splitlines() if line.startswith("qdora evaluate"))
    assert line == f"qdora evaluate 'my base' --adapter 'my out' {says}"
    assert parse("evaluate", shlex.split(line)[2:]).adapter == "my out"


def test_evaluations_stand_in_a_table(tmp_path: Path) -> None:
    history = [{"eval_loss": 1.0, "eval_perplexity": 2.718, "step": 5}, {"eval_loss": 1.5, "step": 10}]
    facts = replace(
        FACTS, history=history, best_step=5, evaluation="9 rows", evaluation_dataset="e.jsonl", sample="s" * 3000
    )
    write_report(facts, tmp_path / "r.md")
    page = (tmp_path / "r.md").read_text()
    assert "| 5 (kept) | 1.0000 | 2.718 |" in page
    assert "| 10 | 1.5000 | nan |" in page
    assert "`e.jsonl`: 9 rows" in page
    assert "s" * 2000 + " …" in page
    assert "s" * 2001 not in page


def test_the_log_is_csv(tmp_path: Path) -> None:
    write_log(FACTS.history, tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == 'step,loss,note\n1,2.0,\n2,1.0,"a,b"\n'


def test_a_run_s_own(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=1, save_strategy="no")
    page = (tmp_path / "report.md").read_text()
    assert "QDoRA of rank 4, alpha 8, on all linears" in page
    assert "Question: 0 and 1? Answer:⟦ 1<|im_end|>⟧" in page
    assert "48 rows in the prompt/completion layout" in page
