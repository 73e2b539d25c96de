"""What `test_distributed` has each of two processes do, in one launch: `python -m tests.processes PLAN.json`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import qdora
from qdora.distributed import is_main, local
from qdora.inject import adapted_linears, decoder_layers
from qdora.nf4 import NF4Weight
from qdora.scoring import ScoredModel
from qdora.sharding import Sharding, shard_root

BYTES = (torch.uint8, torch.float8_e5m2)


def packed_bytes(model: torch.nn.Module) -> int:
    weights = [module for module in model.modules() if isinstance(module, NF4Weight)]
    return sum(local(p).untyped_storage().nbytes() for weight in weights for p in weight.parameters())


def living_bytes() -> int:
    """Of every storage of bytes that anything in this process still holds."""
    gc.collect()
    found = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.dtype in BYTES}
    return sum(storages.values())


def sharded(path: str) -> ScoredModel:
    sharding = Sharding(torch.device("cpu"))
    adapter = qdora.AdapterConfig(rank=4, alpha=8, dtype="float32")
    torch.manual_seed(0)
    scored = ScoredModel(qdora.load_model(path, adapter, dtype="float32", device="cpu", sharding=sharding))
    shard_root(scored, sharding)
    return scored


def look_inside(path: str) -> dict[str, Any]:
    """A sharded model: what it holds, that its head is never called, that its norms follow its shards."""
    before = living_bytes()
    scored = sharded(path)
    living = living_bytes() - before
    whole = qdora.load_model(path, dtype="float32", device="cpu")
    batch = {"input_ids": torch.arange(24).view(2, 12)}
    batch["labels"] = batch["input_ids"]
    called: list[str] = []
    scored.model.get_output_embeddings().register_forward_hook(lambda *_: called.append("head"))

    @torch.no_grad()
    def edit() -> None:
        for layer in adapted_linears(scored.model).values():
            local(layer.lora_B).add_(0.1)

    losses = [float(scored(lean=True, **batch))]
    edit()
    scored(lean=True, **batch).backward()
    losses.append(float(scored(lean=True, **batch)))
    for layer in adapted_linears(scored.model).values():
        layer.refresh()
    losses.append(float(scored(lean=True, **batch)))
    gradients = [p.grad for p in scored.parameters() if p.requires_grad]
    return {
        "packed": packed_bytes(scored),
        "living": living,
        "whole": packed_bytes(whole),
        "layers": len(decoder_layers(whole)),
        "losses": losses,
        "called": called,
        "gradients": all(g is not None and torch.isfinite(local(g)).all().item() for g in gradients),
    }


def main(plan: dict[str, Any]) -> None:
    PartialState(cpu=True)
    results: dict[str, Any] = {"inside": look_inside(plan["untied"])}
    for name, flags in plan["runs"].items():
        try:
            report = qdora.train(**flags)
            assert report is not None
            results[name] = report.steps
        except qdora.QDoRAError as error:
            results[name] = str(error)
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, results)
    if is_main():
        Path(plan["results"]).write_text(json.dumps(everyone))
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
