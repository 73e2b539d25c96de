"""Kill quantize, train and merge at random moments, give the same command again until it is done, and compare the bits.

    python scripts/stress_kill.py --kills 100 --seed 0 [--processes 6] [--results scripts/results/DATE-kill-cpu.json]

A trial starts a command and kills it, by the clock (anywhere within the time that it takes undisturbed) or just before
a change to its directory (anywhere within the changes that it makes undisturbed, so that the steps of saving, rotating
and finishing are hit as often as there are of them). It starts the same command again, maybe kills that too, until one
ends by itself. After each kill nothing half-written may have a final name, and what a training has lost is counted.
At the end every file must have the bytes of an undisturbed run, but those that tell times, and nothing may be left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch import Launcher, changes_counted
from safetensors import safe_open

# They tell times, or (the card) the loss of a logging interval that a kill may have cut short.
TIMED = {"report.md", "log.csv", "loss.png", "trainer_state.json", "README.md"}
CHECKPOINT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "magnitude_offsets.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}
SAVE_STEPS = 3
TRAIN = (
    "--lora_r 4 --per_device_train_batch_size 8 --max_length 64 --learning_rate 5e-3 --lora_dropout 0.1 --use_cpu true "
    f"--disable_tqdm true --logging_steps 1 --max_steps 11 --save_strategy steps --save_steps {SAVE_STEPS}"
).split()
BEST = (
    f"--eval_strategy steps --eval_steps {SAVE_STEPS} --load_best_model_at_end true --save_total_limit 2 "
    "--validation_split_percentage 20 --early_stopping_patience 2 --learning_rate 3e-2"
).split()


@dataclass
class Case:
    """A command, and what became of its trials."""

    name: str
    arguments: list[str]
    old: Path | None = None
    """What stands under the output's name before, to be overwritten."""
    seconds: float = 0.0
    changes: int = 0
    """To its directory, undisturbed."""
    expected: dict[str, str] = field(default_factory=dict)
    trials: int = 0
    kills_by_clock: int = 0
    kills_at_changes: int = 0
    identical: int = 0
    most_steps_lost: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.kills_by_clock + self.kills_at_changes


def make_cases(model: Path, nf4: Path, adapter: Path, data: Path) -> list[Case]:
    """Args: a 16-bit model, its NF4 checkpoint, an adapter for that, rows. Outputs are called `out`."""
    quantize = ["quantize", str(model), "out", "--max_shard_size", "60KB"]
    merge = ["merge", str(nf4), str(adapter), "out", "--max_shard_size", "60KB"]
    train = ["train", "--model_name_or_path", str(nf4), "--dataset", str(data), "--output_dir", "out", *TRAIN]
    return [
        Case("quantize", quantize),
        Case("quantize --overwrite", [*quantize, "--overwrite"], old=nf4),
        Case("train", [*train, "--save_total_limit", "1"]),
        Case("train, the best kept", [*train, *BEST]),
        Case("merge", merge),
        Case("merge --overwrite", [*merge, "--overwrite"], old=nf4),
    ]


def measure(case: Case, launcher: Launcher, box: Path) -> None:
    """Run a command undisturbed: its time, its changes, its files."""
    _prepare(case, box)
    started = time.perf_counter()
    launcher.start(case.arguments, box)
    if launcher.wait() != 0:
        raise RuntimeError(f"{case.name} fails undisturbed: {(box / 'log').read_text()}")
    case.seconds, case.changes = time.perf_counter() - started, changes_counted(box)
    case.expected = digests(box / "out")


def trial(case: Case, launcher: Launcher | None, box: Path, dice: random.Random, by_clock: bool) -> None:
    """Kill a command until it survives, and compare.

    Args:
        launcher: None starts whole processes, `python -m qdora`.
    """
    _prepare(case, box)
    case.trials += 1
    kill_again = True
    while True:
        before = (box / "log").stat().st_size if (box / "log").is_file() else 0
        at = dice.randint(1, case.changes) if kill_again and not by_clock else None
        after = dice.uniform(0, case.seconds) if kill_again and by_clock else None
        status = _run(case.arguments, launcher, box, at, after)
        said = (box / "log").read_bytes()[before:].decode()
        if status != -signal.SIGKILL:
            break
        case.kills_by_clock += by_clock
        case.kills_at_changes += not by_clock
        case.faults += [f"{case.name}: {fault}" for fault in half_written(case, box / "out")]
        case.most_steps_lost = max(case.most_steps_lost, _steps_lost(said, box / "out"))
        kill_again = dice.random() < 0.5
    _judge(case, status, said, box)


def _run(arguments: Sequence[str], launcher: Launcher | None, box: Path, at: int | None, after: float | None) -> int:
    if launcher is None:
        with (box / "log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "qdora", *arguments]
            process = subprocess.Popen(command, cwd=box, stdout=log, stderr=log, env=environment)
            try:
                return process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()
    child = launcher.start(arguments, box, at)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return launcher.wait()


def _judge(case: Case, status: int, said: str, box: Path) -> None:
    out = box / "out"
    # A command that was killed when all was done finds its own output, and says so.
    done = status == 0 or (status == 2 and ("is not empty" in said or "finished with these settings" in said))
    differing = differences(case.expected, digests(out)) if out.is_dir() else ["no output"]
    left = [path.name for path in (*box.iterdir(), *out.rglob("*")) if re.search("unfinished|lock|repl", path.name)]
    # The last kill may have come when all stood and only scratch files were to go; the next run there takes them.
    left = left if status == 0 else []
    if done and not differing and not left:
        case.identical += 1
    else:
        case.faults.append(f"{case.name}: status {status}, differing {differing}, left {left}: {said[-400:]}")


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file in an output that does not tell times."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in TIMED]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of files that differ, miss or are too many; of checkpoints those that differ, for others may be kept."""
    both, either = expected.keys() & found.keys(), expected.keys() | found.keys()
    unequal = {name for name in either if expected.get(name) != found.get(name)}
    return sorted(name for name in unequal if name in both or not name.startswith("checkpoint-"))


def half_written(case: Case, out: Path) -> list[str]:
    """What has a final name and is not whole."""
    if case.arguments[0] != "train":
        known = [{}, case.expected, *([digests(case.old)] if case.old else [])]
        return [] if digests(out) in known else [f"{out.name} is neither the old nor the new"]
    faults = []
    for checkpoint in out.glob("checkpoint-*"):
        missing = CHECKPOINT - {path.name for path in checkpoint.iterdir()}
        faults += [f"{checkpoint.name} lacks {', '.join(sorted(missing))}"] if missing else []
    for path in out.glob("[!.]*"):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except Exception as error:
            faults.append(f"{path.name}: {error}")
    return faults


def _steps_lost(said: str, out: Path) -> int:
    """How many steps a killed training had said were done that no checkpoint holds."""
    done = [int(step) for step in re.findall(r"^step (\d+) of", said, re.MULTILINE)]
    saved = [int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*")]
    return max(done, default=0) - max(saved, default=0) if done else 0


def _prepare(case: Case, box: Path) -> None:
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir(parents=True)
    if case.old is not None:
        shutil.copytree(case.old, box / "out")


def make_inputs(directory: Path, launcher: Launcher) -> list[Case]:
    """A tiny Llama with the tests' tokenizer, its NF4 checkpoint, an adapter and rows."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import make_model

    model, data = make_model(directory / "model", shard="60KB"), directory / "pairs.jsonl"
    rows = [{"prompt": f"Question: {i} and {i + 1}? Answer:", "completion": f" {2 * i + 1}"} for i in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nf4, adapter = directory / "nf4", directory / "adapter"
    flags = ["--model_name_or_path", str(nf4), "--dataset", str(data), "--output_dir", str(adapter), *TRAIN]
    flags += ["--max_steps", "2"]
    for arguments in (["quantize", str(model), str(nf4)], ["train", *flags]):
        launcher.start(arguments, directory)
        if launcher.wait() != 0:
            raise RuntimeError((directory / "log").read_text())
    return make_cases(model, nf4, adapter, data)


def table(cases: Sequence[Case]) -> str:
    lines = [f"{'':<22}{'trials':>8}{'killed by clock':>17}{'at a change':>13}{'identical':>11}{'steps lost':>12}"]
    for case in cases:
        lost = f"{case.most_steps_lost} of {SAVE_STEPS}" if case.arguments[0] == "train" else "-"
        counts = f"{case.trials:>8}{case.kills_by_clock:>17}{case.kills_at_changes:>13}{case.identical:>11}{lost:>12}"
        lines.append(f"{case.name:<22}{counts}")
    return "\n".join([*lines, *(fault for case in cases for fault in case.faults)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many, over all commands")
    parser.add_argument("--processes", type=int, default=6, help="of the trials, start so many as whole processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("runs/kill/kill.json"))
    options = parser.parse_args()
    from record import write_result

    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch, Launcher() as launcher:
        box = Path(scratch) / "box"
        cases = make_inputs(Path(scratch), launcher)
        for case in cases:
            measure(case, launcher, box)
            print(f"{case.name}: {case.seconds:.1f} s, {case.changes} changes", flush=True)
        while sum(case.kills for case in cases) < options.kills:
            for case in cases:
                trial(case, launcher, box, dice, by_clock=dice.random() < 0.4)
            print(f"{sum(case.kills for case in cases)} kills", flush=True)
        in_processes = _with_processes(cases, options.processes, box, dice)
    print(table([*cases, *in_processes]))
    hidden = ("expected", "arguments", "old")
    results = [{k: v for k, v in asdict(case).items() if k not in hidden} for case in (*cases, *in_processes)]
    write_result(options.results, {"seed": options.seed, "save_steps": SAVE_STEPS, "results": results})


def _with_processes(cases: Sequence[Case], count: int, box: Path, dice: random.Random) -> list[Case]:
    """Trials of whole processes, each with a start of its own; their imports may be hit too."""
    found = []
    for number in range(count):
        like = cases[number % len(cases)]
        case = Case(f"{like.name}, process", like.arguments, like.old, like.seconds, like.changes, like.expected)
        _prepare(case, box)
        started = time.perf_counter()
        _run(case.arguments, None, box, None, None)
        case.seconds = time.perf_counter() - started
        trial(case, None, box, dice, by_clock=True)
        found.append(case)
    return found


if __name__ == "__main__":
    main()
