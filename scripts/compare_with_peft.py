"""Is it the same training? One loss curve by qdora, one by PEFT's QDoRA, from the same start on the same batches.

    python scripts/compare_with_peft.py --model runs/demo/base-nf4 --data gsm8k_train.jsonl --out curve.json

Both train fp32 adapters with torch's AdamW on the same NF4 weights; PEFT loads its start from the adapter that qdora
saved. What differs is the engine: the factored norm, c in the absmax, tiles, and where bf16 rounds. `--dtype float32`
takes that last difference away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure_learning import lay_out, read
from peft import PeftModel
from record import write_result
from transformers import AutoModelForCausalLM
from upcast import in_fp32

import qdora
from qdora.data import EncodedData, encode
from qdora.loss import answer_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an NF4 checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of {'messages': [user, assistant]}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=192)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the arithmetic")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = lay_out(read(arguments.data)[: arguments.steps * arguments.batch_size], "prompt")
    data = encode(rows, qdora.load_tokenizer(arguments.model), arguments.max_length)
    with tempfile.TemporaryDirectory() as start:
        torch.manual_seed(0)
        config = qdora.AdapterConfig(rank=16, alpha=32, dtype="float32")
        ours = qdora.load_model(arguments.model, adapter=config, dtype=arguments.dtype)
        qdora.save_adapter(ours, start)
        curves = {"qdora": curve(ours, ours, data, arguments)}
        del ours
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        base = in_fp32(base) if arguments.dtype == "float32" else base
        theirs = PeftModel.from_pretrained(base, start, is_trainable=True)
        curves["peft"] = curve(theirs, base, data, arguments)
    report(curves, arguments)


def curve(adapted: Any, model: Any, data: EncodedData, arguments: argparse.Namespace) -> list[float]:
    """The loss at each step, before its update."""
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate)
    losses = []
    for ids, mask, labels in batches(data, arguments.batch_size):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        loss = answer_loss(hidden, model.get_output_embeddings().weight, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        print(f"step {len(losses)}: {losses[-1]:.4f}", flush=True)
    return losses


def batches(data: EncodedData, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, mask, labels) of rows in their order, padded on the right."""
    for start in range(0, len(data) - size + 1, size):
        rows = [torch.tensor(row) for row in data.input_ids[start : start + size]]
        labels = [torch.tensor(row) for row in data.labels[start : start + size]]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        yield pad(rows, batch_first=True), mask, pad(labels, batch_first=True, padding_value=-100)


def report(curves: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    gaps = [abs(a - b) / b for a, b in zip(curves["qdora"], curves["peft"], strict=True)]
    means = {name: sum(losses) / len(losses) for name, losses in curves.items()}
    result = {
        "largest_relative_gap_of_a_step": max(gaps),
        "relative_gap_of_the_mean": abs(means["qdora"] - means["peft"]) / means["peft"],
        "mean_loss": means,
        "curves": {name: [round(loss, 5) for loss in losses] for name, losses in curves.items()},
        "settings": {
            name: getattr(arguments, name) for name in ("steps", "batch_size", "max_length", "learning_rate", "dtype")
        },
        "data": arguments.data.name,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=2))
    if arguments.out:
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
