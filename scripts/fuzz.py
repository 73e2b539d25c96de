"""Damage everything that qdora reads, in many ways, and count what comes of it.

    python scripts/fuzz.py --mutants 20000 --seed 1

The mutants, their readers and the watched process are those of `tests/test_fuzz.py`; this runs more of them. Exits with
1 if any ended otherwise than in success or in one clear error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import write_result

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fuzzing import SECONDS, SOUND, Result, watch  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a mutant hangs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--kind", help="show what came of each mutant of this kind")
    parser.add_argument("--results", type=Path, default=None)
    arguments = parser.parse_args()
    started = time.perf_counter()
    counts: dict[str, Counter[str]] = {}
    bad: list[Result] = []
    numbers = range(arguments.first, arguments.first + arguments.mutants)
    with tempfile.TemporaryDirectory(prefix="qdora-fuzz-") as seeds:
        for result in watch(Path(seeds), numbers, arguments.seed, arguments.seconds):
            counts.setdefault(result.kind, Counter())[result.outcome.partition(" (")[0]] += 1
            if result.outcome not in SOUND:
                bad.append(result)
                print(f"{result.number} {result.kind}, {result.how}: {result.outcome}\n{result.said}", flush=True)
            elif result.kind == arguments.kind:
                print(f"{result.number} {result.how}: {result.outcome} {result.said}", flush=True)
            if time.perf_counter() - started > 60 * arguments.minutes:
                break
    seconds = time.perf_counter() - started
    print(table(counts))
    total = sum(map(Counter.total, counts.values()))
    print(f"{total:,} mutants in {seconds:.0f} s, {len(bad)} ended otherwise than they should")
    if arguments.results is not None:
        write_result(arguments.results, figures(arguments, counts, bad, seconds))
    return 1 if bad else 0


def figures(arguments: Any, counts: dict[str, Counter[str]], bad: list[Result], seconds: float) -> dict[str, Any]:
    return {
        "mutants": sum(map(Counter.total, counts.values())),
        "seed": arguments.seed,
        "seconds": round(seconds),
        "outcomes": dict(sum(counts.values(), Counter())),
        "by_kind": {kind: dict(found) for kind, found in sorted(counts.items())},
        "otherwise": [f"{result.number} {result.kind}, {result.how}: {result.outcome}" for result in bad],
    }


def table(counts: dict[str, Counter[str]]) -> str:
    outcomes = sorted(set().union(*counts.values()), key=lambda name: (name not in SOUND, name))
    lines = ["".join([f"{'':<16}", *(f"{name:>10}" for name in outcomes)])]
    for kind, found in sorted(counts.items()):
        lines.append("".join([f"{kind:<16}", *(f"{found[name]:>10,}" for name in outcomes)]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
