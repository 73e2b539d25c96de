"""Memory runs out at each place of a run: the place is named, what is whole is saved, and flags that fit are given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qdora
from qdora import QDoRAError, exhausted
from qdora.arguments import flags_of, parse_train
from qdora.dora import DoRALinear
from qdora.errors import out_of_memory
from qdora.exhausted import Headroom
from qdora.nf4 import NF4Weight
from qdora.plan import Plan
from tests.conftest import make_model
from tests.test_train import QUICK, adapter_tensors, quick
from tests.test_trainer import log_of

Inject = Callable[..., None]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_it_is_known_by_many_names(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Lets a function run so many times, and then run out of memory."""

    def into(owner: Any, name: str, times: int, when: Callable[..., bool] = lambda *_: True) -> None:
        function, calls = getattr(owner, name), 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            before, calls = calls, calls + bool(when(*args))
            if before == times < calls:
                raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, full)

    return into


def in_backward(*_: Any) -> bool:
    return torch._C._current_graph_task_id() != -1


LAYERS = r"model\.layers\."
# Of the first layer, q, k and v are asked for no gradient of their input.
PLACES: list[tuple[str, Any, str, int, Any, str]] = [
    ("forward", DoRALinear, "forward", 28 + 28 * 2 + 3, None, f"in the forward of {LAYERS}0.self_attn.o_proj"),
    ("recompute", DoRALinear, "forward", 28, in_backward, f"in the recompute of {LAYERS}1.self_attn.q_proj"),
    ("backward", NF4Weight, "linear_transposed", 2 * (14 - 3), None, f"in the backward of {LAYERS}1.mlp.down_proj"),
    ("loss", sys.modules["qdora.loss"], "_chunk_nll", 2, None, "in the loss"),
]


@pytest.mark.parametrize(
    ("owner", "name", "times", "when", "says"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES]
)
def test_a_step(
    owner: Any,
    name: str,
    times: int,
    when: Any,
    says: str,
    inject: Inject,
    tiny_nf4: Path,
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    """In the third step: the second's weights are saved, though no checkpoint was asked for."""
    inject(owner, name, times, *([] if when is None else [when]))
    says = (
        rf"out of memory {says}.*, after 2 of 5 steps \(Tried to allocate 2 GiB\); of .* this plan takes .* with "
        r"--per_device_train_batch_size \d .*; the last good checkpoint is .*checkpoint-2: go on with --resume_from"
    )
    with pytest.raises(QDoRAError, match=says):
        quick(tiny_nf4, pairs_file, tmp_path / "out", max_steps=5, save_steps=100)
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


def test_an_update_that_was_not_finished_is_not_saved(
    inject: Inject, tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    inject(sys.modules["qdora.optimizer"], "_update", 2 * 2 + 1)  # two groups; in the third step, the first is done
    says = "in the optimizer's step, after 2 of 5 steps .*; no checkpoint was written yet: begin anew"
    with pytest.raises(QDoRAError, match=says):
        quick(tiny_nf4, pairs_file, tmp_path / "out", max_steps=5, save_steps=100)
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("choosing", [False, True])
def test_the_evaluation_has_a_flag_of_its_own(
    choosing: bool, inject: Inject, tiny_nf4: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Where the best is to be chosen, a checkpoint without its evaluation would take no part in that."""
    inject(DoRALinear, "forward", 28, lambda layer, *_: not layer.training)  # the first 28 try out the head
    says = "in the evaluation, in the forward of .*q_proj, after 2 of .* lower --per_device_eval_batch_size, which is 8"
    way = "no checkpoint was written yet: begin anew" if choosing else "the last good checkpoint is .*checkpoint-2"
    flags = {"max_steps": 5, "eval_dataset": str(pairs_file), "eval_steps": 2, "load_best_model_at_end": choosing}
    with pytest.raises(QDoRAError, match=f"{says}.*{way}"):
        quick(tiny_nf4, pairs_file, tmp_path / "out", **flags)
    assert (tmp_path / "out" / "checkpoint-2").exists() != choosing


def test_loading(inject: Inject, tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    inject(sys.modules["qdora.model"], "freeze_packed", 0)
    with pytest.raises(QDoRAError, match=r"out of memory while the model was loaded \(Tried.*; of .* this plan takes"):
        quick(tiny_nf4, pairs_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def headroom(model: Path, room: int, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Headroom:
    monkeypatch.setattr(exhausted, "_room_on", lambda _: room)
    settings = {**QUICK, "model_name_or_path": str(model), "dataset": "none", "output_dir": "none", **flags}
    return Headroom(*parse_train(flags_of(settings)), sharded=False)


def test_the_flags_are_the_planner_s(tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = headroom(tiny_nf4, 10**9, monkeypatch).advice()
    flags = said.partition(" with ")[2].split()
    settings = {**QUICK, "load_in_4bit": True, **dict(zip((f[2:] for f in flags[::2]), flags[1::2], strict=True))}
    fits = qdora.estimate(tiny_nf4, **{k: v for k, v in settings.items() if k != "disable_tqdm"})
    asked = qdora.estimate(tiny_nf4, **{k: v for k, v in QUICK.items() if k != "disable_tqdm"})
    assert fits.need.device_bytes <= 0.9 * asked.need.device_bytes
    assert fits.plan.rows * fits.plan.accumulation == 8
    assert "nothing fits in 10 kB: the least is" in headroom(tiny_nf4, 10**4, monkeypatch).advice()
    odd = headroom(tiny_nf4, 10**9, monkeypatch, per_device_train_batch_size=5, loss_chunk_size="4MiB").advice()
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 5" in odd
    assert "--hold_outputs" not in odd


def test_what_is_to_be_left_out_is_said(tiny_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = headroom(tiny_nf4, 10**9, monkeypatch, hold_outputs=True)
    without = Plan(rows=8, accumulation=1, loss_chunk_bytes=2**20)
    monkeypatch.setattr(exhausted, "choose", lambda reckoned, *_: (without, reckoned.need(without)))
    assert asked.advice().endswith("--loss_chunk_size 1MiB --hold_outputs false")


def test_another_micro_batch_goes_on_at_the_same_row(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """What the flags say keeps the rows of a step, so that the steps after resuming are those of the first run."""
    flags = {"max_steps": 8, "save_steps": 4, "dtype": "float32", "adapter_dtype": "float32"}
    quick(tiny_nf4, pairs_file, tmp_path / "whole", **flags)
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    resume = str(tmp_path / "whole" / "checkpoint-4")
    quick(tiny_nf4, pairs_file, tmp_path / "resumed", resume_from_checkpoint=resume, **flags, **smaller)
    whole, resumed = ([row["loss"] for row in log_of(tmp_path / name) if row["loss"]] for name in ("whole", "resumed"))
    assert [float(loss) for loss in resumed] == pytest.approx([float(loss) for loss in whole], rel=1e-3)
    a, b = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "resumed")
    assert all(torch.allclose(tensor, b[key], rtol=1e-2, atol=1e-4) for key, tensor in a.items())


def test_the_host_s_own_memory(pairs_file: Path, tmp_path: Path) -> None:
    """A limit on the process: the allocator's error is no traceback."""
    model = make_model(tmp_path / "model", intermediate_size=32768)
    program = (
        "import psutil, sys; from qdora.cli import main; import qdora.verbs.train, qdora.trainer; "
        "p = psutil.Process(); p.rlimit(psutil.RLIMIT_AS, (p.memory_info().vms + 6 * 10**8,) * 2); "
        "sys.exit(main(sys.argv[1:]))"
    )
    data = tmp_path / "long.jsonl"
    data.write_text(('{"text": "' + "The quick brown fox jumps over the lazy dog. " * 100 + '"}\n') * 48)
    flags = {**QUICK, "per_device_train_batch_size": 24, "max_length": 512, "load_in_4bit": False, "max_steps": 1}
    flags |= {"model_name_or_path": str(model), "dataset": str(data), "output_dir": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *flags_of(flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("qdora: out of memory in the forward of model.layers.0.mlp."), line
    assert "this plan takes" in line
    assert "Traceback" not in done.stderr
