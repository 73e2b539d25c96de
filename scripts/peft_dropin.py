"""A script for PEFT and TRL, with the one line of qdora and without it: the same losses, the time, the memory.

    python scripts/peft_dropin.py runs/demo/base-nf4 --out dropin.json

What `train` does is what such scripts do: a 4-bit model through transformers, a `LoraConfig`, TRL's trainer. Each run
is a process of its own, from the same seed on the same rows; runs take turns. Memory is the most that torch's allocator
held above the loaded model, in two steps of a process that is not timed. Run it alone on the machine. (The model stays
in train mode: on some CPUs bitsandbytes repacks its weights in eval mode, and PEFT then computes with garbage.) TRL
rounds adapters on a 4-bit model to bf16, and PEFT then the norm, so that a fresh adapter changes its model by up to 1 %
of the loss; `--dtype float32`, adapters included, takes that away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo_data import make_rows
from peft import LoraConfig
from record import most_allocated, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer
from upcast import in_fp32

import qdora

NAMES = {"qdora": "with the line", "peft": "without it"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an NF4 checkpoint")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the arithmetic")
    parser.add_argument("--lora", action="store_true", help="LoRA instead of DoRA")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(arguments, scratch)))
        return
    result = compare(arguments)
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_result(arguments.out, result)


def train(arguments: argparse.Namespace, model: Any, out: str, steps: int, clock: Clock) -> SFTTrainer:
    """The script itself."""
    set_seed(0)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        use_dora=not arguments.lora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if arguments.run == "qdora":
        config = qdora.use_in_peft(config)  # the line
    settings = SFTConfig(
        out,
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        disable_tqdm=True,
    )
    rows = [{"prompt": f"{row['input']}\n", "completion": row["output"]} for row in make_rows(400, seed=0)]
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=config,
        callbacks=[clock],
    )
    if arguments.dtype == "float32":
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    trainer.train()
    return trainer


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seconds.append(-time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds[-1] += time.perf_counter()


def measure(arguments: argparse.Namespace, out: str) -> dict[str, Any]:
    """What a process of its own does."""
    model, clock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).train(), Clock()
    if arguments.dtype == "float32":
        model = in_fp32(model)
    if arguments.memory:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train(arguments, model, out, 2, clock)
        return {"bytes": most_allocated(profile)}
    trainer = train(arguments, model, out, arguments.steps, clock)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in entries],
        "tokens": entries[-1]["num_tokens"],
        "seconds": clock.seconds,
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    found: dict[str, dict[str, Any]] = {}
    for number in range(arguments.rounds):
        for name in NAMES:
            found[name] = in_a_process(name)
            seconds[name].append(statistics.median(found[name]["seconds"][1:]))  # the first warms up
            print(f"round {number + 1}, {NAMES[name]}: {seconds[name][-1]:.2f} s a step", file=sys.stderr, flush=True)
    memory = {name: in_a_process(name, "--memory")["bytes"] for name in NAMES}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ours, theirs = (found[name]["losses"] for name in ("qdora", "peft"))
    return {
        "method": "LoRA" if arguments.lora else "DoRA",
        "dtype": arguments.dtype,
        "tokens_per_step": round(found["qdora"]["tokens"] / arguments.steps),
        "seconds_per_step": {NAMES[name]: round(value, 3) for name, value in middle.items()},
        "megabytes_above_the_model": {NAMES[name]: round(value / 1e6, 1) for name, value in memory.items()},
        "time_ratio": round(middle["qdora"] / middle["peft"], 3),
        "memory_ratio": round(memory["qdora"] / memory["peft"], 3),
        "largest_relative_gap_of_a_loss": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
        "losses": {NAMES[name]: found[name]["losses"] for name in NAMES},
    }


def in_a_process(name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--run", name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
