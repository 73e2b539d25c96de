"""The main job from end to end on a real model: quantize, train, merge, with exact match before and after.

    python scripts/demo.py MODEL [--out runs/demo]

The task: a spoken note about an expense or an appointment becomes strict JSON (see `demo_data.py`). The held-out notes
are not in the training data, and many of their names, places and things occur nowhere in it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import demo_data
import torch
from transformers import AutoModelForCausalLM

import qdora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, a directory or a Hub id of a small chat model")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows to answer")
    arguments = parser.parse_args()
    started, out = time.perf_counter(), arguments.out

    train_rows, eval_rows = demo_data.split(train=8 * arguments.steps, evaluation=arguments.rows, seed=0)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("notes_train", train_rows), ("notes_eval", eval_rows)):
        chats = [{"messages": [*question(row), {"role": "assistant", "content": row["output"]}]} for row in rows]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")

    print("\n1. quantize")
    print(qdora.quantize(arguments.model, out / "base-nf4", overwrite=True))
    table = [("before training (NF4)", score(qdora.load_model(out / "base-nf4"), out, eval_rows))]

    print("\n2. train")
    report = qdora.train(
        model_name_or_path=str(out / "base-nf4"),
        dataset=str(out / "notes_train.jsonl"),
        eval_dataset=str(out / "notes_eval.jsonl"),
        output_dir=str(out / "adapter"),
        overwrite_output_dir=True,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=256,
        # A model this small has room for its activations; on a large one leave checkpointing on.
        gradient_checkpointing=False,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=arguments.steps // 2,
        save_strategy="no",
    )
    print(report)
    adapted = qdora.load_model(out / "base-nf4", adapter=out / "adapter")
    table.append(("after training (NF4 + adapter)", score(adapted, out, eval_rows, show=3)))

    print("\n3. merge")
    print(qdora.merge(out / "base-nf4", out / "adapter", out / "merged", overwrite=True))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    table.append(("after merging (fp16, transformers)", score(merged, out, eval_rows)))

    print(f"\nexact match on {len(eval_rows)} held-out notes")
    for name, share in table:
        print(f"  {name:<36} {100 * share:5.1f} %")
    print(f"loss picture: {out / 'adapter' / 'loss.png'}\n{time.perf_counter() - started:.0f} seconds in all")


def question(row: demo_data.Row) -> list[dict[str, str]]:
    """The chat up to the answer: the task as the system's message, the note as the user's."""
    return [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]}]


def score(model: Any, out: Path, rows: list[demo_data.Row], show: int = 0) -> float:
    """The share of rows that the model answers exactly; prints the first few."""
    tokenizer = qdora.load_tokenizer(out / "base-nf4")
    answers = answer(model, tokenizer, rows)
    for row, text in list(zip(rows, answers, strict=True))[:show]:
        print(f"  {row['input']}\n    → {text}")
    right = [demo_data.exact_match(text, row["output"]) for row, text in zip(rows, answers, strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, rows: list[demo_data.Row], batch_size: int = 50) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    model.eval()
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(rows), batch_size):
        prompts = [
            tokenizer.apply_chat_template(question(row), tokenize=False, add_generation_prompt=True)
            for row in rows[start : start + batch_size]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        tokens = model.generate(**batch, max_new_tokens=56, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    main()
