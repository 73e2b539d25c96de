"""What the measuring scripts share: the results file, and waiting for a device."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("qdora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def write_result(path: Path, figures: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Write the figures as JSON, under the command, date, device and versions that they came from."""
    content = {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "load_at_the_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    amx = " and AMX" if any(line.startswith("flags") and " amx_bf16 " in f"{line} " for line in lines) else ""
    return f"{cpu}, CPU with {torch.backends.cpu.get_cpu_capability()}{amx}"


def synchronize(device: torch.device) -> None:
    """Wait until what was asked of the device is done, so that a clock read next tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def most_allocated(profile: Any) -> int:
    """The most bytes that torch's allocator held at once on the CPU, above what it held when the profile began.

    Args:
        profile: a finished `torch.profiler.profile` with `profile_memory=True`.
    """
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
