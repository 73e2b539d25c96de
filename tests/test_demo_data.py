"""The demo's notes: the same for a seed, apart between training and evaluation, readable; and a strict score."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import demo_data as demo
import pytest

SCRIPT = Path(demo.__file__)

KEYS = {
    "expense": ["type", "amount", "currency", "item", "place"],
    "appointment": ["type", "who", "what", "day", "time"],
}
EXPECTED = '{"type":"expense","amount":23,"currency":"EUR","item":"taxi","place":null}'


@pytest.fixture(scope="module")
def rows():
    return demo.split(1200, 300, 0)


def values(rows, field):
    return {answer[field] for row in rows if (answer := json.loads(row["output"])).get(field) is not None}


def test_same_seed_same_rows():
    assert demo.make_rows(50, 3) == demo.make_rows(50, 3)
    assert demo.make_rows(50, 3) != demo.make_rows(50, 4)
    assert demo.split(60, 30, 3) == demo.split(60, 30, 3)
    assert demo.split(60, 30, 3)[1] != demo.split(60, 30, 4)[1]


def test_same_seed_same_files_in_another_process(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--train", "40", "--eval", "10", "--seed", "7"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(printed.splitlines()) == 2
    for name, expected in zip(("train", "eval"), demo.split(40, 10, 7), strict=True):
        lines = (tmp_path / "out" / f"notes_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected


def test_counts_and_no_note_twice(rows):
    train, evaluation = rows
    assert (len(train), len(evaluation)) == (1200, 300)
    assert len({row["input"] for row in train + evaluation}) == 1500
    assert demo.make_rows(0, 0) == []


def test_held_out_values_occur_only_in_evaluation(rows):
    train, evaluation = rows
    for field, fresh in demo.held_out_values().items():
        assert not values(train, field) & fresh
        assert len(values(evaluation, field) & fresh) >= len(fresh) / 2
        said = re.compile(rf"\b({'|'.join(map(re.escape, sorted(fresh)))})\b", re.IGNORECASE)
        assert not [row["input"] for row in train if said.search(row["input"])]


def test_about_a_third_of_evaluation_fields_are_held_out(rows):
    answers = [json.loads(row["output"]) for row in rows[1]]
    fields = demo.held_out_values()
    given = [answer[field] in fresh for field, fresh in fields.items() for answer in answers if answer.get(field)]
    assert 0.25 < sum(given) / len(given) < 0.42


def test_vocabulary_is_large_and_without_repeats():
    for field, least in {"who": 60, "what": 25, "item": 60, "place": 40}.items():
        phrases = [phrase for phrases in demo.VOCABULARY[field] for phrase in phrases]
        assert len(set(phrases)) == len(phrases) >= least


def test_every_row_is_well_formed(rows):
    for row in [*rows[0], *rows[1]]:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == demo.INSTRUCTION
        assert row["input"] == row["input"].strip()
        assert not re.search(r"[{}\n]|  ", row["input"])
        answer = json.loads(row["output"])
        assert list(answer) == KEYS[answer["type"]]
        assert demo.exact_match(row["output"], row["output"])


def test_answers_follow_from_the_notes(rows):
    for row in [*rows[0], *rows[1]]:
        note, answer = row["input"].lower(), json.loads(row["output"])
        for field in ("item", "place", "who", "what", "day"):
            assert answer.get(field) is None or answer[field].lower() in note
        if answer["type"] == "expense":
            sign, word = {"EUR": ("€", "euros"), "USD": ("$", "dollars"), "GBP": ("£", "pounds")}[answer["currency"]]
            said = re.search(rf"(?:{re.escape(sign)})(\d+(?:\.\d\d)?)|(\d+(?:\.\d\d)?) {word}", note)
            assert said is not None
            assert float(said[1] or said[2]) == answer["amount"]
        elif answer["time"] is not None:
            assert answer["time"] == clock(note)


def clock(note: str) -> str:
    """The time in a note, read independently of how the note was made."""
    if "noon" in note:
        return "12:00"
    said = re.search(r"(\d+)(?::(\d\d))?(?: (am|pm))?", note)
    assert said is not None
    return f"{int(said[1]) + (12 if said[3] == 'pm' else 0):02}:{said[2] or '00'}"


def test_what_the_note_omits_is_null_moderately_often(rows):
    answers = [json.loads(row["output"]) for row in rows[0]]
    for field in ("place", "who", "what", "time"):
        held = [answer[field] for answer in answers if field in answer]
        assert 0.1 < held.count(None) / len(held) < 0.4
    assert all(answer.get("who") or answer.get("what") for answer in answers if answer["type"] == "appointment")


def test_patterns_are_many():
    assert len(set(demo.EXPENSES)) >= 15
    assert len(set(demo.APPOINTMENTS)) >= 15


@pytest.mark.parametrize(
    "answer",
    [
        EXPECTED,
        f"\n  {EXPECTED}\n",
        json.dumps(json.loads(EXPECTED), indent=2),
        json.dumps(dict(reversed(json.loads(EXPECTED).items()))),
    ],
    ids=["same", "white space", "indented", "other order"],
)
def test_exact_match_accepts(answer):
    assert demo.exact_match(answer, EXPECTED)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "null",
        "[]",
        f"[{EXPECTED}]",
        EXPECTED + " Done.",
        "Here it is: " + EXPECTED,
        EXPECTED + EXPECTED,
        f"```json\n{EXPECTED}\n```",
        EXPECTED.replace('"', "'"),
        EXPECTED[:-1],
        EXPECTED[:-1] + ",}",
        EXPECTED.replace("23", '"23"'),
        EXPECTED.replace("23", "23.0"),
        EXPECTED.replace("23", "NaN"),
        EXPECTED.replace("23", "Infinity"),
        EXPECTED.replace("23", "1e999"),
        EXPECTED.replace("23", "9" * 5000),
        EXPECTED.replace("null", '"null"'),
        EXPECTED.replace("null", '""'),
        EXPECTED.replace(',"place":null', ""),
        EXPECTED[:-1] + ',"note":null}',
        EXPECTED[:-1] + ',"place":null}',
        EXPECTED.replace("taxi", "Taxi"),
        EXPECTED.replace("taxi", "taxi "),
        EXPECTED.replace("null", '{"a":[{"b":{}}]}'),
        EXPECTED.replace("null", "[" * 100_000),
        '{"a":' * 100_000,
        "{\x00}",
        "\ud800",
        "\ufeff" + EXPECTED,
    ],
)
def test_exact_match_refuses(answer):
    assert not demo.exact_match(answer, EXPECTED)


def test_exact_match_compares_values_not_spellings():
    assert demo.exact_match('{"amount":12.50}', '{"amount":12.5}')
    assert not demo.exact_match('{"amount":true}', '{"amount":1}')


def test_exact_match_never_equates_what_is_not_json():
    for text in ("", "NaN", '{"a":NaN}', '{"a":1e999}', '{"a":1,"a":1}', "not json"):
        assert not demo.exact_match(text, text)
