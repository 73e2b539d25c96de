"""The same seed gives the same bits: in another process, under another hash seed, with workers that load the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.arguments import flags_of
from tests.test_train import QUICK, adapter_tensors

FLAGS: dict[str, Any] = {**QUICK, "max_steps": 4, "save_strategy": "no", "lora_dropout": 0.2, "seed": 7}
SHUFFLED = {"validation_split_percentage": 20, "eval_steps": 2}
PACKED = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_length": 64}


def start(model: Path, data: Path, out: Path, hash_seed: int, **flags: Any) -> subprocess.Popen[str]:
    named = {"model_name_or_path": str(model), "dataset": str(data), "output_dir": str(out)}
    command = [sys.executable, "-m", "qdora", "train", *flags_of({**FLAGS, **named, **flags})]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = adapter_tensors(one), adapter_tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    losses = [
        [
            entry["loss"]
            for entry in json.loads((path / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for path in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "otherwise"),
    [
        ({**SHUFFLED}, {"dataloader_num_workers": 2}),
        ({**PACKED, "full_determinism": True}, {}),
    ],
    ids=["shuffled, other workers", "packed, deterministic algorithms"],
)
def test_another_process_gives_the_same_bits(
    flags: dict[str, Any], otherwise: dict[str, Any], tiny: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """From 16-bit weights, so that quantizing them is repeated as well."""
    one = start(tiny, pairs_file, tmp_path / "one", hash_seed=1, **flags)
    other = start(tiny, pairs_file, tmp_path / "other", hash_seed=2, **{**flags, **otherwise})
    ended(one)
    ended(other)
    assert_same_bits(tmp_path / "one", tmp_path / "other")


def test_full_determinism_is_settled_before_the_model(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    """cuBLAS looks at its variable when it is first used; after that, setting it does nothing."""
    program = (
        "import os, sys, torch; import qdora.verbs.train as train; load = train.load_model\n"
        "def look(*args, **kwargs):\n"
        "    print(os.environ['CUBLAS_WORKSPACE_CONFIG'], torch.are_deterministic_algorithms_enabled())\n"
        "    return load(*args, **kwargs)\n"
        "train.load_model = look; train.train_from_arguments(sys.argv[1:])"
    )
    named = {"model_name_or_path": str(tiny_nf4), "dataset": str(pairs_file), "output_dir": str(tmp_path / "out")}
    command = [sys.executable, "-c", program, *flags_of({**FLAGS, **named, "max_steps": 1, "full_determinism": True})]
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ":16:8 True" in done.stdout
