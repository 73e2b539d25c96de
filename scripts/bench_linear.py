"""What one NF4 linear costs by its number of tokens: generation has one a sequence, training thousands.

    python scripts/bench_linear.py                          # 4096 → 11008
    python scripts/bench_linear.py --tokens 1 2 4 --out scripts/results/linear.json

Beside qdora's tiles, with the magnitude folded in as generation with an adapter does it: bitsandbytes' own 4-bit
product, which an engine could call in their place (with the same folded absmax), and the product with the weight in
bf16, which none can beat. They take turns, round after round; the figures are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import synchronize, write_result
from torch import Tensor

from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in_features", type=int, default=4096)
    parser.add_argument("--out_features", type=int, default=11008)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(arguments.out_features, arguments.in_features).mul_(0.02)
    base = NF4Weight.from_tensors(quantize_nf4(weight.bfloat16())).to(arguments.device)
    scale = torch.rand(arguments.out_features, device=arguments.device) + 0.5
    table = {}
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.in_features, dtype=torch.bfloat16, device=arguments.device)
        table[tokens] = milliseconds(contestants(base, scale, x), arguments.rounds, x.device)
        print(f"{tokens:>5} tokens: " + ", ".join(f"{name} {value:.2f} ms" for name, value in table[tokens].items()))
    if arguments.out:
        shape = {"in_features": arguments.in_features, "out_features": arguments.out_features}
        write_result(arguments.out, {**shape, "milliseconds_by_tokens": table}, arguments.device)


def contestants(base: NF4Weight, scale: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same product in three ways."""
    dense = base.dequantize(x.dtype) * scale[:, None].to(x.dtype)
    packed, shape = base.packed.view(-1, 1), (base.out_features, base.in_features)

    def bitsandbytes() -> Tensor:
        absmax = (base.block_absmax().view(base.out_features, -1) * scale[:, None]).view(-1)
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, absmax, base.blocksize, "nf4")

    return {
        "qdora's tiles": lambda: base.linear(x, scale),
        "bitsandbytes' 4-bit product": bitsandbytes,
        "dense bf16": lambda: x @ dense.t(),
    }


def milliseconds(functions: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median of each, taken in turn after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if number > 0:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


if __name__ == "__main__":
    main()
