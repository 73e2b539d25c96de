"""The same command goes on where its run was, and nothing else does."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Launcher
from stress_kill import Case, differences, digests, measure
from transformers import TrainerCallback

import qdora.verbs.train
from qdora import CheckpointError, ConfigError, arithmetic
from qdora.signals import Stopped
from tests.conftest import CHAT_TEMPLATE
from tests.test_train import QUICK, quick

FLAGS: dict[str, Any] = {"max_steps": 7, "save_steps": 2, "lora_dropout": 0.1, "lr_scheduler_type": "linear"}


@pytest.fixture(scope="module")
def whole(tiny_nf4: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of the steps 2, 4, 6 and 7."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """The same run, as a kill would leave it after its last checkpoint."""
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("adapter_model*", "report.md"))
    for checkpoint in whole.glob("checkpoint-*"):
        shutil.copytree(checkpoint, tmp_path / "out" / checkpoint.name, dirs_exist_ok=True)
    record = json.loads((whole / "qdora_train.json").read_text())
    (tmp_path / "out" / "qdora_train.json").write_text(json.dumps({**record, "finished": False}))
    return tmp_path / "out"


@pytest.mark.parametrize("missing", [(), ("checkpoint-7",), ("checkpoint-7", "checkpoint-6"), "all"])
def test_an_unfinished_run_goes_on(
    missing: Any, whole: Path, out: Path, tiny_nf4: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [path.name for path in out.glob("checkpoint-*")] if missing == "all" else missing:
        shutil.rmtree(out / name)
    left = sorted(path.name for path in out.glob("checkpoint-*"))
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    said = capsys.readouterr().out
    assert f"{out} holds this run unfinished" in said
    assert f"going on from {left[-1]}" in said if left else "starting from the beginning" in said
    assert not differences(digests(whole), digests(out))
    assert (out / "report.md").is_file()


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    file: str, out: Path, tiny_nf4: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint, keep in (("checkpoint-7", 0.5), ("checkpoint-6", 0.0)):
        content = (out / checkpoint / file).read_bytes()
        (out / checkpoint / file).write_bytes(content[: int(keep * len(content))])
    (out / "checkpoint-4" / file).unlink()
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    said = capsys.readouterr().out
    assert [f"checkpoint-{step} is not whole" in said for step in (7, 6, 4, 2)] == [True, True, True, False]
    assert "going on from checkpoint-2" in said


def test_a_run_does_not_change_its_arithmetic(
    out: Path, tiny_nf4: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = arithmetic.multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda _: not here)
    with pytest.raises(ConfigError, match=r"with other settings \(dtype \"?b?float(16|32)"):
        quick(tiny_nf4, pairs_file, out, **FLAGS)


def test_what_is_not_this_run_is_refused(whole: Path, out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match="holds an earlier run, finished with these settings; choose another"):
        quick(tiny_nf4, pairs_file, whole, **FLAGS)
    (out / "checkpoint-7" / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"checkpoint-7 is damaged or cut short .*resume from an earlier one"):
        quick(tiny_nf4, pairs_file, out, **FLAGS, resume_from_checkpoint="last")
    with pytest.raises(ConfigError, match=r"with other settings \(learning_rate 0\.005 there, 0\.1 here\)"):
        quick(tiny_nf4, pairs_file, out, **FLAGS, learning_rate=0.1)
    other = shutil.copy(pairs_file, out / "other.jsonl")
    Path(other).write_text(pairs_file.read_text().replace("Question", "Query"))
    record = json.loads((out / "qdora_train.json").read_text())
    record["settings"]["dataset"] = str(other)  # the same name, other rows
    (out / "qdora_train.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"with other settings \(dataset_sha256 "):
        quick(tiny_nf4, Path(other), out, **FLAGS)
    (out / "qdora_train.json").unlink()
    with pytest.raises(ConfigError, match="holds an earlier run; go on with --resume_from_checkpoint last"):
        quick(tiny_nf4, pairs_file, out, **FLAGS)


def test_an_output_that_was_taken_away_is_made_again(
    whole: Path, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", []
    monkeypatch.setattr("qdora.runrecord.say", said.append)

    class TakeAway(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                shutil.rmtree(out)

    build = qdora.verbs.train.build_trainer

    def built(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(TakeAway())
        return trainer

    monkeypatch.setattr("qdora.verbs.train.build_trainer", built)
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    assert f"{out} was taken away since the training began; it was made again with checkpoint-6" in said
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_run_whose_output_was_taken_away_can_be_stopped(
    tiny_nf4: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    class TakeAwayAndStop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                shutil.rmtree(out)
                signal.raise_signal(signal.SIGTERM)

    build = qdora.verbs.train.build_trainer

    def built(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(TakeAwayAndStop())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("qdora.verbs.train.build_trainer", built)
        with pytest.raises(Stopped, match=r"saved as .*checkpoint-6; the same command goes on from there$"):
            quick(tiny_nf4, pairs_file, out, **FLAGS)
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    assert "going on from checkpoint-6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_r": 2}, "has rank 2 here and 4 in the adapter"),
        ({"lora_alpha": 5}, "is scaled by .* here and by .* in the adapter"),
        ({"use_dora": False}, "one of model and adapter has a magnitude"),
        ({"lora_target_modules": ["q_proj"]}, "adapts other linears than the model does"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    flags: dict[str, Any], message: str, out: Path, tiny_nf4: Path, pairs_file: Path
) -> None:
    before = digests(out)
    with pytest.raises(CheckpointError, match=rf"^cannot go on from .*checkpoint-4: .*{message}.*; keep the base and"):
        quick(tiny_nf4, pairs_file, out, **FLAGS, resume_from_checkpoint=str(out / "checkpoint-4"), **flags)
    assert digests(out) == before


@pytest.mark.parametrize(("flag", "value"), [("freeze", "magnitude"), ("loraplus_lr_ratio", 4.0)])
def test_so_does_another_grouping_of_the_optimizer(
    flag: str, value: Any, out: Path, tiny_nf4: Path, pairs_file: Path
) -> None:
    before = digests(out)
    with pytest.raises(ConfigError, match=rf"checkpoint-4 holds the optimizer's state of --{flag} .*; keep "):
        quick(tiny_nf4, pairs_file, out, **FLAGS, resume_from_checkpoint="checkpoint-4", **{flag: value})
    assert digests(out) == before


def test_a_checkpoint_is_found_by_its_name(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to resume: checkpoint-5 is not a trainer's checkpoint; name one"):
        quick(tiny_nf4, pairs_file, out, **FLAGS, resume_from_checkpoint="checkpoint-5")
    report = quick(tiny_nf4, pairs_file, out, **FLAGS, resume_from_checkpoint="checkpoint-4")
    assert report.steps == 7


def test_no_step_is_left(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    flags = {**FLAGS, "max_steps": 6, "resume_from_checkpoint": "checkpoint-6"}
    with pytest.raises(ConfigError, match=r"checkpoint-6 has 6 steps already; --max_steps 6 leaves none, give more$"):
        quick(tiny_nf4, pairs_file, out, **flags)


def test_no_epoch_is_left(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    """48 rows in batches of 8 are 6 steps; which is known before anything is changed."""
    before = digests(out)
    flags = {**FLAGS, "max_steps": -1, "num_train_epochs": 1, "resume_from_checkpoint": "checkpoint-6"}
    with pytest.raises(ConfigError, match=r"checkpoint-6 has 6 steps already; --num_train_epochs 1 leaves none, give"):
        quick(tiny_nf4, pairs_file, out, **flags)
    assert digests(out) == before


def test_what_a_resumed_run_takes_from_its_flags(
    out: Path, tiny_nf4: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The intervals, and not the rate, which is the schedule's."""
    flags = {
        **FLAGS,
        "save_steps": 3,
        "logging_steps": 2,
        "learning_rate": 0.1,
        "resume_from_checkpoint": "checkpoint-4",
    }
    quick(tiny_nf4, pairs_file, out, **flags)
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6, 7)}
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [row["step"] for row in rows if row["loss"]][-2:] == ["6", "7"]
    said = capsys.readouterr()
    assert "the learning rate goes on as in " in said.out
    assert "(0.005); --learning_rate 0.1 is for a new run" in said.out
    assert "do not match" not in said.err


def test_a_run_that_ended_before_its_first_checkpoint_protects_nothing(
    out: Path, tiny_nf4: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (out / "adapter_config.json").unlink(missing_ok=True)
    quick(tiny_nf4, pairs_file, out, **{**FLAGS, "max_steps": 1})
    assert f"{out} holds a run that ended before its first checkpoint; beginning anew" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(
        ConfigError, match=r"holds an earlier run with other settings \(.*\); choose another directory, or"
    ):
        quick(tiny_nf4, pairs_file, out, **FLAGS)


def test_a_dry_run_looks_at_no_earlier_one(whole: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    before = digests(whole)
    flags = {
        **QUICK,
        **FLAGS,
        "model_name_or_path": str(tiny_nf4),
        "dataset": str(pairs_file),
        "output_dir": str(whole),
    }
    assert qdora.train(**flags, dry_run=True) is None
    assert digests(whole) == before


def test_overwriting_begins_anew_once(
    whole: Path, out: Path, tiny_nf4: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(tiny_nf4, pairs_file, out, **FLAGS, overwrite_output_dir=True)
    assert "going on" not in capsys.readouterr().out
    assert not differences(digests(whole), {**digests(out), "qdora_train.json": digests(whole)["qdora_train.json"]})
    record = json.loads((out / "qdora_train.json").read_text())
    (out / "qdora_train.json").write_text(json.dumps({**record, "finished": False}))
    quick(tiny_nf4, pairs_file, out, **FLAGS, overwrite_output_dir=True)
    assert "going on from checkpoint-7" in capsys.readouterr().out


def test_a_course_that_is_left_is_set_aside(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    flags = {**FLAGS, "learning_rate": 0.1, "resume_from_checkpoint": str(out / "checkpoint-4"), "max_steps": 5}
    quick(tiny_nf4, pairs_file, out, **flags)
    names = sorted(path.name for path in out.glob("*checkpoint-*"))
    assert [name.rpartition("-")[0] if name.startswith("earlier") else name for name in names] == [
        *(f"checkpoint-{step}" for step in (2, 4, 5)),
        *(f"earlier-checkpoint-{step}" for step in (6, 7)),
    ]


def test_the_newest_and_the_best_are_kept(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {
        "eval_dataset": str(pairs_file),
        "eval_steps": 1,
        "save_total_limit": 1,
        "max_steps": 5,
        "greater_is_better": True,  # so that the first is the best
    }
    report = quick(tiny_nf4, pairs_file, tmp_path, **flags)
    assert report.best_step == 1
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5"}
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == tmp_path / "checkpoint-1"


def test_early_stopping_is_as_patient_as_it_was(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"validation_split_percentage": 25, "early_stopping_patience": 3, "eval_steps": 1, "max_steps": 20}
    flags["learning_rate"] = 1e-30  # the same loss at each step, on every machine
    report = quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    assert (report.steps, report.best_step) == (4, 1)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / f"checkpoint-{report.steps}")
    record = json.loads((out / "qdora_train.json").read_text())
    (out / "qdora_train.json").write_text(json.dumps({**record, "finished": False}))
    again = quick(tiny_nf4, pairs_file, out, **flags)
    assert (again.steps, again.best_step, again.eval_loss) == (report.steps, report.best_step, report.eval_loss)


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def killed(step: int, model: Path, data: Path, out: Path, **flags: Any) -> None:
    """A run that ends in the middle of a step."""
    build = qdora.verbs.train.build_trainer

    def built(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(Kill(step))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdora.verbs.train.build_trainer", built)
        with pytest.raises(KeyboardInterrupt):
            quick(model, data, out, **flags)


def weights_of(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("again", [{}, {"resume_from_checkpoint": "last"}])
def test_a_longer_run_that_is_killed_early_is_not_taken_for_the_shorter_one(
    again: dict[str, Any], tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    flags = {"save_steps": 2, "lora_dropout": 0.1}
    for name in ("out", "whole"):
        quick(tiny_nf4, pairs_file, tmp_path / name, **flags, max_steps=2)
    longer = {**flags, "max_steps": 5, "resume_from_checkpoint": "last"}
    quick(tiny_nf4, pairs_file, tmp_path / "whole", **longer)
    for step in (3, 5):  # before its first own checkpoint, and after it
        killed(step, tiny_nf4, pairs_file, tmp_path / "out", **longer)
    assert (
        quick(tiny_nf4, pairs_file, tmp_path / "out", **{**longer, "resume_from_checkpoint": None, **again}).steps == 5
    )
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    record = json.loads((tmp_path / "out" / "qdora_train.json").read_text())
    assert (record["finished"], record["began_at"]) == (True, 2)


def test_checkpoints_that_hold_the_adapter_alone_are_kept(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"save_only_model": True, "save_steps": 2, "max_steps": 4}
    killed(3, tiny_nf4, pairs_file, tmp_path, **flags)
    with pytest.raises(
        ConfigError, match=r"adapter alone \(--save_only_model\); go on with --resume_from_checkpoint last"
    ):
        quick(tiny_nf4, pairs_file, tmp_path, **flags)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert quick(tiny_nf4, pairs_file, tmp_path, **flags, resume_from_checkpoint="last").steps == 4


def test_damaged_checkpoints_are_set_aside_and_not_removed(
    whole: Path, out: Path, tiny_nf4: Path, pairs_file: Path
) -> None:
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"PK")
    quick(tiny_nf4, pairs_file, out, **FLAGS)
    assert len(list(out.glob("earlier-checkpoint-*"))) == 4
    assert weights_of(out) == weights_of(whole)


def test_a_disk_that_does_not_answer_is_no_damage(
    out: Path, tiny_nf4: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("qdora.kept.zipfile.ZipFile", fails)
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoint-7.*later"):
        quick(tiny_nf4, pairs_file, out, **FLAGS)
    assert len(list(out.glob("checkpoint-*"))) == 4


BEST = {
    "save_total_limit": 1,
    "eval_steps": 1,
    "max_steps": 4,
    "greater_is_better": True,  # so that the first is the best
}


@pytest.mark.parametrize("finished", [True, False])
def test_the_best_is_found_where_the_directory_was_moved(
    finished: bool, tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    flags = {**BEST, "eval_dataset": str(pairs_file)}
    if finished:
        quick(tiny_nf4, pairs_file, tmp_path / "before", **flags)
    else:
        killed(3, tiny_nf4, pairs_file, tmp_path / "before", **flags)
    out = (tmp_path / "before").rename(tmp_path / "after")
    best = weights_of(out / "checkpoint-1")
    again = {"resume_from_checkpoint": "last"} if finished else {}
    assert quick(tiny_nf4, pairs_file, out, **flags, **again).best_step == 1
    assert weights_of(out) == best
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}


def test_another_run_s_checkpoint_does_not_mix_with_what_is_there(
    out: Path, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    quick(tiny_nf4, pairs_file, there, max_steps=1, save_steps=1)
    flags = {"max_steps": 9, "save_steps": 9, "resume_from_checkpoint": str(out / "checkpoint-7")}
    with pytest.raises(ConfigError, match="there holds an earlier run with other settings"):
        quick(tiny_nf4, pairs_file, there, **flags)
    flags["overwrite_output_dir"] = True
    killed(8, tiny_nf4, pairs_file, there, **flags)
    assert [path.name.rpartition("-")[0] for path in there.glob("*checkpoint-*")] == ["earlier-checkpoint-1"]
    assert quick(tiny_nf4, pairs_file, there, **{**flags, "resume_from_checkpoint": None}).steps == 9
    assert f"whole checkpoint of its own; starting from {out / 'checkpoint-7'}, as it did" in capsys.readouterr().out


def test_the_same_command_with_another_run_s_checkpoint_goes_on_with_its_own(
    out: Path, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_steps": 11, "save_steps": 2, "resume_from_checkpoint": str(out / "checkpoint-6")}
    quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    there = tmp_path / "there"
    for step in (7, 9):  # before its first own checkpoint, and after it
        killed(step, tiny_nf4, pairs_file, there, **flags)
    quick(tiny_nf4, pairs_file, there, **flags)
    assert "going on from checkpoint-8" in capsys.readouterr().out
    assert sorted(path.name for path in there.glob("*checkpoint-*")) == [f"checkpoint-{i}" for i in (10, 11, 8)]
    assert weights_of(there) == weights_of(tmp_path / "whole")
    shutil.rmtree(out / "checkpoint-6")
    record = json.loads((there / "qdora_train.json").read_text())
    (there / "qdora_train.json").write_text(json.dumps({**record, "finished": False}))
    for checkpoint in there.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ConfigError, match=r"nothing to resume: .*checkpoint-6 is not a trainer's checkpoint"):
        quick(tiny_nf4, pairs_file, there, **{**flags, "resume_from_checkpoint": None})


def test_the_same_command_with_a_checkpoint_beside_its_own_goes_on_with_the_newest(
    out: Path, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out, tmp_path / "uninterrupted")
    flags = {"max_steps": 10, "save_steps": 2, "resume_from_checkpoint": "checkpoint-6"}
    quick(tiny_nf4, pairs_file, tmp_path / "uninterrupted", **flags)
    killed(9, tiny_nf4, pairs_file, out, **flags)
    aside = sorted(out.glob("earlier-*"))
    assert [path.name.rpartition("-")[0] for path in aside] == ["earlier-checkpoint-7"]
    capsys.readouterr()
    quick(tiny_nf4, pairs_file, out, **flags)
    assert "going on from checkpoint-8" in capsys.readouterr().out
    assert sorted(out.glob("earlier-*")) == aside
    assert weights_of(out) == weights_of(tmp_path / "uninterrupted")
    assert "10 steps, the last 2 of them in " in (out / "report.md").read_text()


def test_another_chat_template_is_another_run(tiny_nf4: Path, tmp_path: Path) -> None:
    """By its content, whatever its file is called."""
    data, template = tmp_path / "rows.jsonl", tmp_path / "chat.jinja"
    turns = [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "42"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    flags = {"max_steps": 1, "save_strategy": "no", "chat_template_path": str(template)}
    template.write_text(CHAT_TEMPLATE)
    quick(tiny_nf4, data, tmp_path / "out", **flags)
    with pytest.raises(ConfigError, match="holds an earlier run, finished with these settings"):
        quick(tiny_nf4, data, tmp_path / "out", **flags)
    template.write_text(CHAT_TEMPLATE.replace("assistant", "model"))
    with pytest.raises(ConfigError, match=r"with other settings \(chat_template_path_sha256 \S+ there, \S+ here\)"):
        quick(tiny_nf4, data, tmp_path / "out", **flags)


def test_a_fresh_optimizer_is_not_traded_for_an_older_state(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    """Another optimizer from a checkpoint without a state, killed before a checkpoint of its own."""
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    flags = {**FLAGS, "optim": "adafactor", "max_steps": 8}
    killed(7, tiny_nf4, pairs_file, out, **flags, resume_from_checkpoint=str(out / "checkpoint-6"))
    assert quick(tiny_nf4, pairs_file, out, **flags).steps == 8
    assert json.loads((out / "qdora_train.json").read_text())["began_at"] == 6
    with pytest.raises(ConfigError, match=r"its optimizer has no beta1, .* or remove its optimizer\.pt and pass"):
        quick(tiny_nf4, pairs_file, out, **flags, resume_from_checkpoint=str(out / "checkpoint-4"))


def test_another_optimizer_or_other_parts(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    last = {**FLAGS, "resume_from_checkpoint": str(out / "checkpoint-4")}
    with pytest.raises(ConfigError, match=r"holds the state of --optim \w+, which is of no use to adafactor; keep"):
        quick(tiny_nf4, pairs_file, out, **last, optim="adafactor")
    (out / "qdora_train.json").unlink()  # nobody says how it was trained
    with pytest.raises(
        ConfigError, match=r"trained otherwise, .* groups of \[28, 14\] parameters, and there are \[28\]; keep"
    ):
        quick(tiny_nf4, pairs_file, out, **last, freeze="magnitude")


def test_the_decay_is_the_one_that_is_asked_for_now(out: Path, tiny_nf4: Path, pairs_file: Path) -> None:
    quick(tiny_nf4, pairs_file, out, **FLAGS, weight_decay=0.5, resume_from_checkpoint=str(out / "checkpoint-6"))
    state = torch.load(out / "checkpoint-7" / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.5]


def test_a_full_disk_is_one_line_and_costs_nothing(cases: dict[str, Case], launcher: Launcher, tmp_path: Path) -> None:
    case, box = cases["train"], tmp_path / "box"
    if not case.expected:
        measure(case, launcher, tmp_path / "whole")
    box.mkdir()
    launcher.start(case.arguments, box, kill_at=case.changes // 2)
    assert launcher.wait() == -9
    (checkpoint,) = (box / "out").glob("checkpoint-*")
    before = digests(checkpoint)
    launcher.start(case.arguments, box, largest_file=20_000)
    assert launcher.wait() == 2
    line = (box / "log").read_text().splitlines()[-1]
    assert line.startswith("qdora: cannot write out/checkpoint-")
    assert line.endswith("make room, and the same command goes on from the newest checkpoint that is there")
    assert digests(checkpoint) == before
    assert [path.name for path in (box / "out").glob("checkpoint-*")] == [checkpoint.name]
    launcher.start(case.arguments, box)
    assert launcher.wait() == 0
    assert not differences(case.expected, digests(box / "out"))


@pytest.mark.parametrize(
    "flags",
    [
        # The checkpoint of an epoch's last step, and the evaluation that is due then.
        {"validation_split_percentage": 25, "per_device_train_batch_size": 9, "lora_dropout": 0.1},
        {
            "validation_split_percentage": 25,
            "per_device_train_batch_size": 9,
            "learning_rate": 0.05,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0},
        },
        {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 12, "save_steps": 3},
        {"optim": "adafactor", "lr_scheduler_type": "linear"},
        {"eval_on_start": True, "validation_split_percentage": 25, "eval_steps": 2, "early_stopping_patience": 3},
    ],
    ids=["epoch", "plateau", "lengths", "adafactor", "eval on start"],
)
def test_the_same_bits_after_a_kill(flags: dict[str, Any], tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    saves = {} if "eval_steps" in flags else {"save_steps": 4}
    flags = {"max_steps": 12, "learning_rate": 0.01, **saves, **flags}
    quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    killed(7, tiny_nf4, pairs_file, tmp_path / "out", **flags)
    quick(tiny_nf4, pairs_file, tmp_path / "out", **flags)
    whole, out = (json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "out"))
    measured = [[entry for entry in state["log_history"] if "eval_loss" in entry] for state in (whole, out)]
    assert [(entry["step"], entry["eval_loss"]) for entry in measured[0]] == [
        (entry["step"], entry["eval_loss"]) for entry in measured[1]
    ]
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "out")


def test_a_fresh_optimizer_goes_on_with_the_schedule(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 6e-3}
    killed(5, tiny_nf4, pairs_file, tmp_path, **flags, save_only_model=True)
    quick(tiny_nf4, pairs_file, tmp_path, **flags, save_only_model=True, resume_from_checkpoint="last")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


@pytest.mark.parametrize("change", ["data", "metric", "length", "neither"])
def test_the_best_of_another_measure_counts_for_nothing(
    change: str, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figure may be one that no later one can be better than."""
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    easy.write_text(pairs_file.read_text())
    hard.write_text('{"prompt": "The fox:", "completion": " jumps over 9 lazy dogs"}\n' * 8)
    flags = {"eval_steps": 4, "learning_rate": 5e-3, "resume_from_checkpoint": None}
    quick(tiny_nf4, pairs_file, tmp_path / "out", **flags, eval_dataset=str(easy), max_steps=8)
    flags |= {"eval_dataset": str(hard if change == "data" else easy), "resume_from_checkpoint": "last"}
    if change == "length":
        flags |= {"max_length": 32}
    if change == "metric":
        flags |= {"eval_exact_match": 4, "metric_for_best_model": "exact_match"}
    killed(10, tiny_nf4, pairs_file, tmp_path / "out", **flags, max_steps=16)  # before its first own checkpoint
    capsys.readouterr()
    report = quick(tiny_nf4, pairs_file, tmp_path / "out", **flags, max_steps=16)
    said = "checkpoint-8 was measured otherwise; the best is chosen from here on" in capsys.readouterr().out
    assert said == (change != "neither")
    assert report.best_step is not None
    assert report.best_step > 8
