"""How much memory a piece of work takes: of the process, and of torch's allocator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from record import most_allocated

_PROGRAM = """
import resource, sys

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

{warm_up}
before = peak()
{work}
print("PEAK", peak() - before)
"""


def peak_of(work: str, warm_up: str) -> int:
    """Bytes by which the resident peak rises over that of the warm-up, which imports what is needed."""
    program = _PROGRAM.format(work=work, warm_up=warm_up)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("PEAK")[2])


def allocated_by(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator holds at once for it, on the CPU, above what it held before.

    Without oneDNN, whose 16-bit products take scratch memory from the same allocator on some CPUs.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.profiler.profile(activities=cpu, profile_memory=True) as profile,
    ):
        work()
    return most_allocated(profile)
