"""What four well-known models need to be trained in 6 to 24 GB, plan and peak of each, and two mixtures: from their
configs alone.

    python scripts/estimate_models.py --out scripts/results/estimates.json

Asked for: 4 rows of 2,048 tokens a step, rank 16, all linears. The plans keep the step's rows and change how it is run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from record import write_result

import qdora

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
MODELS = ("Mistral-7B", "Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B")
SIZES = ("6GB", "8GB", "12GB", "16GB", "24GB")
_LEAN = {"activation_offloading": True, "embedding_on_host": True, "stream_base": True}
MIXTURES = {"Mixtral-8x7B": True, "Qwen3-30B-A3B": False}  # streamed, with inputs and embedding on the host; resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--mixtures", nargs="*", choices=MIXTURES, default=[*MIXTURES])
    parser.add_argument("--memory", nargs="+", default=SIZES)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--out", type=Path, help="a .json file")
    arguments = parser.parse_args()
    found = [row(name, size, arguments.length) for name in arguments.models for size in arguments.memory]
    for entry in found:
        sizes = "" if entry["peak_gb"] is None else "{peak_gb:.2f} | {host_gb:.1f} |".format(**entry)
        print("| {model} | {memory} | {plan} | {sizes}".format(**entry, sizes=sizes))
    # one row at a time, with nothing left to the device that may wait on the host, streamed or not
    leanest = [
        one_row(name, arguments.length, **{**_LEAN, "stream_base": streamed})
        for name in arguments.models
        for streamed in (False, True)
    ]
    mixtures = [one_row(name, arguments.length, **(_LEAN if MIXTURES[name] else {})) for name in arguments.mixtures]
    for entry in [*leanest, *mixtures]:
        print("| {model} | {flags} | {peak_gb:.2f} | {host_gb:.1f} |".format(**entry))
    if arguments.out:
        write_result(
            arguments.out, {"length": arguments.length, "plans": found, "one_row": leanest, "mixtures": mixtures}
        )


def row(name: str, memory: str, length: int) -> dict[str, Any]:
    """The fastest plan for a model and a size."""
    started = time.perf_counter()
    base = {"model": name, "memory": memory}
    try:
        found = qdora.estimate(CONFIGS / name, max_length=length, per_device_train_batch_size=4, memory=memory)
    except qdora.ConfigError as error:
        return {**base, "plan": str(error), "peak_gb": None, "host_gb": None}
    seconds = round(time.perf_counter() - started, 1)
    return {**base, "plan": found.plan.flags(), **_sizes(found), "parts": found.need.parts, "seconds": seconds}


def one_row(name: str, length: int, **flags: Any) -> dict[str, Any]:
    """What one row takes."""
    found = qdora.estimate(CONFIGS / name, max_length=length, per_device_train_batch_size=1, **flags)
    return {"model": name, "flags": found.plan.flags(), **_sizes(found), "parts": found.need.parts}


def _sizes(found: qdora.Estimate) -> dict[str, float]:
    return {"peak_gb": found.need.device_bytes / 1e9, "host_gb": found.need.host_bytes / 1e9}


if __name__ == "__main__":
    main()
