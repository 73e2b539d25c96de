"""Directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qdora.errors import CheckpointError, ConfigError, OutputError
from qdora.output import (
    check_file,
    check_output,
    new_directory,
    replace_text,
    save_tensors,
    whole_files,
    write_json,
    writing,
)

MODEL = '{"model_type": "llama"}'


def test_appears_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(MODEL)

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


@pytest.mark.parametrize("content", ['{"port": 80}', "[1", "80"])
def test_somebody_else_s_config_makes_no_model(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no model directory, so --overwrite does not replace it"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text(MODEL)
    (tmp_path / "additional_chat_templates").mkdir()
    assert check_output(tmp_path, overwrite=True) == tmp_path
    (tmp_path / "src").mkdir()
    with pytest.raises(ConfigError, match=r"holds src/, so --overwrite does not replace it"):
        check_output(tmp_path, overwrite=True)


def test_a_mounted_disk_cannot_be_renamed_to() -> None:
    with pytest.raises(ConfigError, match="/proc is where a disk is mounted"):
        check_output("/proc", overwrite=False)


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (model / "config.json").write_text(MODEL)
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


def test_what_a_kill_left_is_put_right(tmp_path: Path) -> None:
    """Between the two renames, and while the old one was being removed."""
    old, scratch = tmp_path / ".out.unfinished-abc-replaced", tmp_path / ".out.unfinished-abc"
    for directory in (old, scratch, tmp_path / ".other.unfinished-abc"):
        directory.mkdir()
    (old / "config.json").write_text(MODEL)
    with pytest.raises(ConfigError, match="not empty"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == MODEL
    assert sorted(os.listdir(tmp_path)) == [".other.unfinished-abc", "out"]
    old.mkdir()
    with new_directory(tmp_path / "out", overwrite=True) as new:
        (new / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".other.unfinished-abc", "out"]


def test_what_another_program_put_there_meanwhile_stays(tmp_path: Path) -> None:
    def disturbed() -> None:
        with new_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(ConfigError, match="not empty"):
        disturbed()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_a_rename_that_fails_brings_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(MODEL)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and not self.name.endswith("-replaced"):
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(OutputError, match=r"out: Read-only file system; make room"),
        new_directory(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == MODEL
    assert os.listdir(tmp_path) == ["out"]


def test_files_come_whole_or_not_at_all(tmp_path: Path) -> None:
    def cut_short() -> None:
        with whole_files(tmp_path) as scratch:
            (scratch / "a").write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert (tmp_path / "a").read_text() == "old"
    with whole_files(tmp_path) as scratch:
        (scratch / "a").write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "a", "\udc80")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("changed", [True, False])
def test_a_kill_between_two_files_leaves_no_mixture(
    changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(config: str, weights: str) -> None:
        with whole_files(tmp_path, last="config") as scratch:
            (scratch / "config").write_text(config)
            (scratch / "weights").write_text(weights)

    write("old", "old")
    replace, moved = Path.replace, []

    def once(self: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        write("new" if changed else "old", "new")
    assert moved == ["weights"]
    assert (tmp_path / "config").exists() != changed


SAVE = """
import sys, torch
from pathlib import Path
from qdora.output import save_tensors
facts = {"format": "pt", **{f"fact {i} ü": str(i) for i in range(8)}}
save_tensors({"b": torch.arange(5), "a": torch.ones(2, 3).bfloat16()}, Path(sys.argv[1]), facts)
"""


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    """In processes of their own, for the order of safetensors' hash map changes from one to the next."""
    for number in range(2):
        subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / str(number))], check=True)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    tensors = load_file(tmp_path / "0")
    assert torch.equal(tensors["b"], torch.arange(5))
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata()["fact 7 ü"] == "7"


@pytest.fixture
def full() -> object:
    """No file may grow past 64 KiB: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = {"a": torch.zeros(2**16)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(BIG, path),
    "ours": lambda path: save_tensors(BIG, path, {"format": "pt"}),
    "torch": lambda path: torch.save(BIG, path),
    "text": lambda path: write_json(path, {"a": "b" * 2**17}),
}


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_full_disk_is_one_line(kind: str, tmp_path: Path) -> None:
    def fill() -> None:
        with new_directory(tmp_path / "out") as scratch:
            WRITERS[kind](scratch / "file")

    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    with pytest.raises(OutputError, match=r"^cannot write .*/out: .*; make room there, or choose another place$"):
        fill()
    assert not os.listdir(tmp_path)


def test_a_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    for write in WRITERS.values():
        with pytest.raises(OutputError, match="cannot write out: "), writing("out"):
            write(tmp_path / "gone" / "file")


@pytest.mark.parametrize("error", [CheckpointError("x (os error 2)"), ValueError("y"), SafetensorError("z")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("out"):
        raise error
    assert caught.value is error


def test_a_file_is_replaced_only_by_its_kind(tmp_path: Path) -> None:
    for name, content in (("data.jsonl", '{"a": 1}\n{"a": 2}\n'), ("list.json", "[1]"), ("config.json", '{"b": 1}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=f"{name} is there already, and is no earlier one .* another --figures"):
            check_file(tmp_path / name, "--figures", ["a", "b"])
    (tmp_path / "earlier.json").write_text('{"a": 1, "b": 2, "c": 3}')
    (tmp_path / "empty.json").touch()  # as `mktemp` leaves it
    for name in ("earlier.json", "new.json", "empty.json"):
        assert check_file(tmp_path / name, "--figures", ["a", "b"]) == tmp_path / name
    assert check_file(tmp_path / "data.jsonl", "--picture") == tmp_path / "data.jsonl"
    with pytest.raises(ConfigError, match="null is there already"):
        check_file("/dev/null", "--figures")
    with pytest.raises(ConfigError, match="is a directory; choose another --figures"):
        check_file(tmp_path, "--figures")


def test_a_directory_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # root may write whatever a mode says
    with pytest.raises(ConfigError, match=r"f\.json: Read-only file system; choose another --figures"):
        check_file(tmp_path / "f.json", "--figures")
    assert not os.listdir(tmp_path)
