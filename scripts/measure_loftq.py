"""What it is worth to begin with what rounding to NF4 took away: held-out loss of a 16-bit model, of its NF4 weights,
and of those with fresh adapters that begin with the rounding's error; then after a few steps of training, either way.

    python scripts/measure_loftq.py MODEL.gguf DATA.jsonl --eval_data HELD_OUT.jsonl [--steps 40]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import qdora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file, which becomes the 16-bit original")
    parser.add_argument("data", help="training rows")
    parser.add_argument("--eval_data", required=True, help="held-out rows")
    parser.add_argument("--eval_rows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/loftq"))
    parser.add_argument("--results", type=Path, default=Path("runs/loftq/loftq.json"))
    arguments = parser.parse_args()
    original, base = arguments.out / "original", arguments.out / "base-nf4"
    unpack(arguments.model, original)
    qdora.quantize(original, base, overwrite=True)

    def loss(model: Path, adapter: Path | None = None) -> float:
        report = qdora.evaluate(
            model, arguments.eval_data, adapter=adapter, max_rows=arguments.eval_rows, exact_match_rows=0
        )
        return report.models["adapter" if adapter else "base"].loss

    figures: dict[str, Any] = {"16-bit": loss(original), "NF4": loss(base)}
    for init in ("default", "loftq"):
        for steps in (0, arguments.steps):
            out = arguments.out / f"{init}-{steps}"
            train(base, original, arguments.data, out, init, steps)
            figures[f"{init}, {steps} steps"] = loss(base, out)
    for name, value in figures.items():
        print(f"{name:<20} {value:.4f}")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    write_result(arguments.results, {"loss": figures, "eval_rows": arguments.eval_rows}, device)


def unpack(gguf: Path, out: Path) -> None:
    if not (out / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def train(base: Path, original: Path, data: str, out: Path, init: str, steps: int) -> None:
    """No steps: one of a rate of zero."""
    qdora.train(
        model_name_or_path=str(base),
        dataset=data,
        output_dir=str(out),
        overwrite_output_dir=True,
        init_lora_weights=init,
        original_model_name_or_path=str(original) if init == "loftq" else None,
        max_steps=max(1, steps),
        learning_rate=2e-4 if steps else 0.0,
        per_device_train_batch_size=8 if steps else 1,
        max_length=256,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
