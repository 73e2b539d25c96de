"""Does it learn? Fine-tune on question-answer chats and measure the answer loss on rows that were not trained on.

    python scripts/measure_learning.py --model runs/demo/base-nf4 --train gsm8k_train.jsonl --eval gsm8k_val.jsonl \
        --layout prompt --out scripts/results/learning.json

Data: JSONL of {"messages": [user, assistant]}. `--layout prompt` turns a row into `Question: …\\nAnswer:` → ` …`,
`--layout chat` leaves it to the chat template. The evaluation is on the last 48 rows, averaged over answer tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_result

import qdora
from qdora.data import encode
from qdora.inject import adapted_linears
from qdora.loss import answer_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--layout", choices=["prompt", "chat"], default="prompt")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lr_scheduler_type", default="constant")
    parser.add_argument("--adapter_dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        train_file = Path(scratch) / "train.jsonl"
        train_rows = lay_out(read(arguments.train), arguments.layout)
        train_file.write_text("".join(json.dumps(row) + "\n" for row in train_rows))
        eval_rows = lay_out(read(arguments.eval)[-48:], arguments.layout)
        tokenizer = qdora.load_tokenizer(arguments.model)
        before = evaluate(qdora.load_model(arguments.model), tokenizer, eval_rows, arguments.max_length)
        print(f"answer loss before: {before:.4f}")
        started = time.perf_counter()
        flags: dict[str, Any] = {
            "model_name_or_path": arguments.model,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.batch_size,
            "max_length": arguments.max_length,
            "lora_r": 16,
            "lora_alpha": 32,
            "learning_rate": arguments.learning_rate,
            "lr_scheduler_type": arguments.lr_scheduler_type,
            "adapter_dtype": arguments.adapter_dtype,
            "logging_steps": 10,
            "save_strategy": "no",
            "seed": arguments.seed,
        }
        qdora.train(**flags, dataset=str(train_file), output_dir=f"{scratch}/adapter")
        seconds = time.perf_counter() - started
        model = qdora.load_model(arguments.model, adapter=f"{scratch}/adapter")
        after = evaluate(model, tokenizer, eval_rows, arguments.max_length)
    offsets = torch.cat([layer.magnitude_offset.flatten() for layer in adapted_linears(model).values()])  # type: ignore[union-attr]
    result = {
        "layout": arguments.layout,
        "answer_loss_before": round(before, 4),
        "answer_loss_after": round(after, 4),
        "magnitudes_moved": round(float((offsets != 0).float().mean()), 6),
        "magnitude_offset_median": float(offsets.detach().abs().float().median()),
        "train_seconds": round(seconds, 1),
        "flags": flags | {"model_name_or_path": Path(arguments.model).name},
        "data": [arguments.train.name, f"{arguments.eval.name}, last 48 rows"],
    }
    print(json.dumps(result, indent=2))
    write_result(arguments.out, result)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lay_out(rows: list[dict[str, Any]], layout: str) -> list[dict[str, Any]]:
    """The rows in the layout asked for."""
    if layout == "chat":
        return rows
    pairs = [[message["content"] for message in row["messages"]] for row in rows]
    return [{"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"} for q, a in pairs]


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> float:
    """Mean loss over all answer tokens, each row cut as in training."""
    encoded = encode(rows, tokenizer, max_length)
    model.eval()
    total = 0.0
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        total += float(answer_loss(hidden, model.get_output_embeddings().weight, torch.tensor([labels])))
    return total / encoded.answer_tokens


if __name__ == "__main__":
    main()
