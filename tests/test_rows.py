"""Data files of each kind, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdora.errors import DataError
from qdora.rows import read_rows


def test_files(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "completion": "é"}, {"prompt": "c,d", "completion": "\n"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\u2028b",é\n"c,d","\n"\n', "utf-8")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        assert read_rows(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object, found list"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.json", b"[1, 2]", "must be a JSON list of objects"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.csv", b'a,b\n"x', "not valid CSV"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "row 2: more fields than the header has"),
        ("a.parquet", b"PAR1", "not valid Parquet"),
        ("a.txt", b"hello", "is none of .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_missing_files(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing"):
        with pytest.raises(DataError, match="no data file at"):
            read_rows(tmp_path / name)


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext\n".encode() + b"x" * 200_000 + b"\n")
    assert read_rows(tmp_path / "a.csv") == [{"text": "x" * 200_000}]


def test_parquet_s_nulls_within_columns_are_none(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"a": [{"x": {"city": "Rome"}}], "b": None}, {"a": [{"x": {"file": "f", "deep": [{"n": 1}]}}], "b": "c"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(name: str, tmp_path: Path) -> None:
    content = {"a.jsonl": '{"text": "x"}', "a.json": '[{"text": "x"}]', "a.csv": "text\nx"}[name]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_rows(tmp_path / name) == [{"text": "x"}]


def test_one_object_over_several_lines_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "x"}]}, indent=2))
    with pytest.raises(DataError, match="must be a JSON list of objects"):
        read_rows(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"text": "x"}')
    assert read_rows(tmp_path / "a.json") == [{"text": "x"}]


def test_a_config_of_the_hub_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        if config is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        return [{"text": f"{name} {config} {split}"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_rows("openai/gsm8k", "test", "main") == [{"text": "openai/gsm8k main test"}]
    with pytest.raises(DataError, match=r"'main', 'socratic'\]\); name one of its configs with --dataset_config"):
        read_rows("openai/gsm8k")
