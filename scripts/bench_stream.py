"""What streaming the frozen base costs: a step with the base resident, streamed through two slots, and under FSDP2.

    python scripts/bench_stream.py                                  # CPU: small shapes, copies between host and host
    python scripts/bench_stream.py --workloads "8B, 32 layers, 1 x 2048 tokens" "8B, 32 layers, 2 x 2048 tokens"

The peer is torch's FSDP2 with CPU offloading at world size 1, the base weights of each layer one unit and the adapters
left on the device; the step, the model and the checkpointing are the same. accelerate's offloading hooks cannot carry
the step: they take a layer's weights away after its forward, before the gradient of its inputs needs them.

Each measurement is a process of its own; methods take turns, round after round. Memory is what torch's allocator held
at most, the loaded model included: on CUDA `max_memory_allocated`, with `max_memory_reserved` beside it; on the CPU the
sizes of the model's own storages and the profiler's record of what came on top. There the host's copies are not
counted: they stay mapped from the checkpoint's file. On CUDA the copies' own time is measured too: what the step takes
beyond the resident one is what of it was not hidden. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_methods import WORKLOADS, Step, Workload, fused_adamw, training_step, write_model
from bench_step import peak_bytes
from record import synchronize, write_result
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import qdora
from qdora.dora import DoRALinear
from qdora.inject import decoder_layers
from qdora.nf4 import NF4Weight
from qdora.stream import LayerStream, StreamedWeight

METHODS = ("resident", "streamed", "FSDP2 offloading")
CPU_WORKLOADS = ("SmolLM2-135M, 512 tokens", "8B-shaped, 2 layers, 1024 tokens")
SEVENTY = {
    f"70B-shaped, {layers} layers, 1 x 2048 tokens": Workload(8192, 28672, layers, 64, 8, 128256, 1, 2048)
    for layers in (4, 16, 40)
}
SHAPES = {**WORKLOADS, **SEVENTY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    large = [f"8B, 32 layers, {rows} x 2048 tokens" for rows in (1, 2, 4)] + ["70B-shaped, 16 layers, 1 x 2048 tokens"]
    workloads = large if on_cuda else CPU_WORKLOADS
    parser.add_argument("--workloads", nargs="+", choices=SHAPES, default=workloads, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after two to warm up")
    parser.add_argument("--models", type=Path, help="where the random models are kept [a temporary directory]")
    parser.add_argument("--out", type=Path, help="a .json file")
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--measure", choices=["time", "memory"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.models = arguments.models or Path(scratch)
        results = [compare(arguments, name) for name in arguments.workloads]
    if arguments.out:
        write_result(arguments.out, {"results": results}, arguments.device)


def compare(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """All methods on one workload, in rounds."""
    print(f"\n{name}", flush=True)
    shape = SHAPES[name]
    write_model(shape, "nf4", directory_of(arguments, name))
    timed: dict[str, list[dict[str, float]]] = {method: [] for method in arguments.methods}
    for _ in range(arguments.rounds):
        for method in arguments.methods:
            timed[method].append(run_child(arguments, "time", method, name))
    rows = {}
    for method, found in timed.items():
        seconds = statistics.median(entry["seconds"] for entry in found)
        row = {
            "seconds": seconds,
            "tokens_per_second": shape.tokens / seconds,
            **run_child(arguments, "memory", method, name),
        }
        row |= {key: found[0][key] for key in found[0] if key != "seconds"}
        rows[method] = row
        figures = ", ".join(f"{key} {value:,.4g}" for key, value in row.items())
        print(f"  {method:<18} {figures}", flush=True)
    losses = {row["loss"] for row in rows.values()}
    return {"workload": name, "tokens": shape.tokens, "same_loss": len(losses) == 1, "methods": rows, "rounds": timed}


def run_child(arguments: argparse.Namespace, what: str, method: str, name: str) -> dict[str, float]:
    flags = ["--measure", what, "--methods", method, "--workloads", name, "--steps", str(arguments.steps)]
    flags += ["--models", str(arguments.models), "--device", arguments.device]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{method} on {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def directory_of(arguments: argparse.Namespace, name: str) -> Path:
    """Workloads that differ in their batch alone share a model."""
    shape = SHAPES[name]
    kind = f"{shape.hidden}-{shape.intermediate}-{shape.layers}-{shape.kv_heads}-{shape.vocabulary}"
    return Path(arguments.models) / kind


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """What a process of its own does: one method on one workload."""
    (method,), (name,) = arguments.methods, arguments.workloads
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model: Any = qdora.load_model(
        directory_of(arguments, name),
        adapter=qdora.AdapterConfig(rank=16, alpha=32),
        device=device,
        stream_base=method == "streamed",
    )
    if method == "FSDP2 offloading":
        offload(model, device)
    ids = torch.randint(0, SHAPES[name].vocabulary, (1, SHAPES[name].batch, SHAPES[name].length), device=device)
    if arguments.measure == "memory":
        return memory(model, ids, device, method)
    step = training_step(model.train(), fused_adamw(model), ids)
    loss = [step(), step()][0]
    gc.collect()
    gc.disable()
    seconds = []
    for _ in range(arguments.steps):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    found = {"seconds": statistics.median(seconds), "loss": loss}
    if method == "streamed" and device.type == "cuda":
        found["copy_seconds"] = copy_seconds(model, device)
    return found


def offload(model: Any, device: torch.device) -> None:
    """FSDP2 with CPU offloading, a single process; the adapters stay where they are."""
    store = torch.distributed.HashStore()
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    for layer in decoder_layers(model):
        for weight in layer.modules():
            if isinstance(weight, NF4Weight):
                weight.pass_for_floats()
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, offload_policy=policy, ignored_params=trained)
    # The root, for fetching ahead from layer to layer; what is its own stays on the device.
    backbone = model.base_model
    fully_shard(backbone, mesh=mesh, ignored_params={p for p in backbone.parameters() if not hasattr(p, "to_local")})


def memory(model: Any, ids: torch.Tensor, device: torch.device, method: str) -> dict[str, float]:
    """The most that was held on the device, in bytes."""

    def adapt() -> Step:
        return training_step(model.train(), fused_adamw(model), ids)

    if device.type == "cuda":
        step = adapt()
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": peak, "reserved_bytes": reserved}
    tensors = [*model.parameters(), *model.buffers()]
    if method == "FSDP2 offloading":
        # what is offloaded waits on the host, which here is the same memory: it is not the device's
        tensors = [t for t in tensors if not hasattr(t, "to_local")]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return {"peak_bytes": held + peak_bytes(adapt, device)}


def copy_seconds(model: Any, device: torch.device) -> float:
    """How long the copies of one step take by themselves: each layer once up, and once down but the last two."""
    streams: set[LayerStream] = {
        layer.base.stream
        for layer in model.modules()
        if isinstance(layer, DoRALinear) and isinstance(layer.base, StreamedWeight)
    }
    (stream,) = streams
    layers = len(decoder_layers(model))
    synchronize(device)
    started = time.perf_counter()
    for index in [*range(layers), *reversed(range(layers - 2))]:
        stream.require(index)
    synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
