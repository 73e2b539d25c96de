"""Directories appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qdora.errors import ConfigError
from qdora.output import check_output, new_directory


def test_appears_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")

    def interrupted() -> None:
        with new_directory(out, overwrite=True) as scratch:
            (scratch / "new").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]
    with new_directory(out, overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert os.listdir(out) == ["new"]


def test_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="not empty"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match="cannot write"), new_directory(tmp_path / "file" / "out"):
        pass
