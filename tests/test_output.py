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
    (out / "config.json").write_text("1")

    def interrupted() -> None:
        with new_directory(out, overwrite=True) as scratch:
            (scratch / "new").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["config.json"]
    with new_directory(out, overwrite=True) as scratch:
        (scratch / "new").write_text("2")
    assert os.listdir(out) == ["new"]


def test_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="not empty"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match=r"no model directory, so --overwrite does not replace it"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="cannot write"), new_directory(tmp_path / "file" / "out"):
        pass


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for out in (model, model.parent, tmp_path / "link", model / ".." / "base"):
        with pytest.raises(ConfigError, match="is or holds the input"):
            check_output(out, overwrite=True, inputs=[model])
    assert check_output(tmp_path / "link", overwrite=True) == model
    with new_directory(tmp_path / "link", overwrite=True) as scratch:
        (scratch / "config.json").write_text("[]")
    assert (model / "config.json").read_text() == "[]"
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(model.parent) == ["base"]
