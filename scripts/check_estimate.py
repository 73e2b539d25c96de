"""Is the estimate true: what `qdora estimate` says beside what real training steps allocated.

    python scripts/check_estimate.py --out scripts/results/estimate-cpu.json
    python scripts/check_estimate.py --device cuda --out scripts/results/estimate-cuda.json

Each configuration is a process of its own: a random model of the shape is written, loaded as `qdora train` loads it,
and trained for two steps by qdora's trainer on rows that are all as long as they may be. On the CPU the truth is the
size of the loaded model's storages and, from there on, the profiler's record of each allocation; streamed weights stay
mapped from their file there, and what waits on the host because a flag says so is in the same memory, by the estimate
too. On CUDA it is `max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_methods import Workload, write_model
from datasets import Dataset
from record import most_allocated, write_result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import qdora
from qdora.arguments import adapter_config, flags_of, parse_train
from qdora.arithmetic import training_dtype
from qdora.callbacks import KeepInputsOnHost
from qdora.holding import linears_to_hold
from qdora.inject import hold_outputs
from qdora.optimizer import CompensatedAdamW
from qdora.planner import hollow_of
from qdora.trainer import AdapterTrainer

SHAPES = {
    "tiny": Workload(128, 256, 4, 4, 2, 512, 1, 64),
    "SmolLM2-135M": Workload(576, 1536, 30, 9, 3, 49152, 1, 2048, tied=True),
    "1B, 6 layers": Workload(2048, 8192, 6, 32, 8, 128256, 1, 2048, tied=True),
    "8B, 4 layers": Workload(4096, 14336, 4, 32, 8, 32000, 1, 2048),
    **{"8B": Workload(4096, 14336, 32, 32, 8, 128256, 1, 2048)},
}


@dataclass(frozen=True)
class Case:
    """What differs between two configurations."""

    shape: str
    length: int
    flags: tuple[str, ...] = ()
    """Of our own switches, those that are on."""
    rows: int = 1
    accumulation: int = 1
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Further flags, of what is trained."""

    @property
    def name(self) -> str:
        batch = f"{self.rows} × {self.length}" + (f", {self.accumulation} micro-batches" * (self.accumulation > 1))
        return ", ".join([self.shape, batch, *self.flags, *(f"{name} {value}" for name, value in self.adapter.items())])

    def settings(self) -> dict[str, Any]:
        """As flags of `qdora train`."""
        return {
            "max_length": self.length,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            **dict.fromkeys(self.flags, True),
            **self.adapter,
        }


def cases(shapes: list[str], lengths: list[int]) -> list[Case]:
    """Resident and streamed for each shape and length, and each other switch once."""
    pairs = [(shape, length) for shape in shapes for length in lengths]
    found = [Case(shape, length, flags) for shape, length in pairs for flags in ((), ("stream_base",))]
    last, shortest = shapes[-1], min(lengths)
    untied = [shape for shape in shapes if not SHAPES[shape].tied]  # a head's weight must be on the device
    return [
        *found,
        Case(shapes[0], shortest, rows=4, accumulation=2),
        Case(shapes[0], shortest, ("activation_offloading",), rows=2),
        Case(last, shortest, ("activation_offloading", "stream_base")),
        Case(shapes[0], shortest, ("hold_outputs",)),
        *(Case(shape, shortest, ("embedding_on_host",)) for shape in untied[-1:]),
        Case(shapes[0], shortest, rows=4, adapter={"modules_to_save": "lm_head"}),
        Case(shapes[0], shortest, rows=2, adapter={"lora_target_modules": r".*layers\.[01]\..*_proj"}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES][1:4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", type=Path, help="where the random models are kept [a temporary directory]")
    parser.add_argument("--out", type=Path, help="a .json file")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--together", action="store_true", help="all in one process: quicker, for a first look")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(Case(**json.loads(arguments.measure)), arguments.models, arguments.device))
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.models = arguments.models or Path(scratch)
        chosen = [case for case in cases(arguments.shapes, arguments.lengths) if arguments.only in case.name]
        rows = [compare(arguments, case) for case in chosen]
    worst = max(abs(row["error"]) for row in rows)
    print(f"largest error {worst:.1%}")
    if arguments.out:
        write_result(arguments.out, {"largest_error": worst, "configurations": rows}, arguments.device)


def compare(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One configuration, reckoned and measured."""
    directory = write_model(SHAPES[case.shape], "nf4", arguments.models / case.shape.replace(" ", "-"))
    reckoned = qdora.estimate(directory, **case.settings(), use_cpu=arguments.device == "cpu").need.device_bytes
    take = measure if arguments.together else measure_apart
    measured = take(case, arguments.models, arguments.device)
    error = reckoned / measured - 1
    print(
        f"{case.name:<60} reckoned {reckoned / 1e6:8,.1f} MB, measured {measured / 1e6:8,.1f} MB  {error:+.1%}",
        flush=True,
    )
    return {"configuration": case.name, "reckoned_bytes": reckoned, "measured_bytes": measured, "error": error}


def measure_apart(case: Case, models_directory: Path, device: str) -> int:
    """As `measure`, in a process of its own."""
    flags = ["--measure", json.dumps(vars(case)), "--models", str(models_directory), "--device", device]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


def measure(case: Case, models_directory: Path, device: str) -> int:
    """Train for two steps; the most that was allocated, the model included."""
    shape = SHAPES[case.shape]
    directory = write_model(shape, "nf4", models_directory / case.shape.replace(" ", "-"))
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "model_name_or_path": directory,
            "dataset": "random",
            "output_dir": output,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": device == "cpu",
            "disable_tqdm": True,
            **case.settings(),
        }
        run, training = parse_train(flags_of(settings))
        model = qdora.load_model(
            directory,
            adapter_config(run),
            device=training.device,
            stream_base=run.stream_base,
            embedding_on_host=run.embedding_on_host,
        )
        if run.hold_outputs:
            run.dtype = run.dtype or training_dtype(training.device)
            hold_outputs(model, linears_to_hold(hollow_of(run, training)))
        meter = Meter(training.device)
        callbacks: list[TrainerCallback] = [meter]
        if training.activation_offloading:
            callbacks.append(KeepInputsOnHost(training.device))
            training.activation_offloading = False
        training.dataset_kwargs = {"skip_prepare_dataset": True}
        training.dataloader_pin_memory = False
        trainer = AdapterTrainer(
            model=model.train(),
            args=training,
            train_dataset=rows_of(case, shape.vocabulary),
            processing_class=a_tokenizer(),
            optimizer_cls_and_kwargs=(CompensatedAdamW, {"lr": training.learning_rate}),
            callbacks=callbacks,
        )
        trainer.train()
    return meter.peak_bytes


def rows_of(case: Case, vocabulary: int) -> Dataset:
    """Random rows with loss on every token; every second one a token shorter, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = [case.length - number % 2 for number in range(2 * case.rows * case.accumulation)]
    if case.rows == 1:
        lengths = [case.length] * len(lengths)
    rows = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def a_tokenizer() -> PreTrainedTokenizerFast:
    """One that the trainer takes; nothing is tokenized with it."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


class Meter(TrainerCallback):
    """The most that was allocated between the beginning of the training and its end, the model included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        tensors = [*model.parameters(), *model.buffers()]
        self._before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._profile.stop()
        self.peak_bytes = self._before + most_allocated(self._profile)


if __name__ == "__main__":
    main()
