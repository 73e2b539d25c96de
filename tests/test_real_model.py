"""SmolLM2-135M-Instruct end to end. A few steps in every run; the whole demo under `-m slow`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_with_peft import in_fp32
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qdora
from qdora.inject import adapted_linears
from qdora.verify import compare

ROOT = Path(__file__).parents[1]
IDS = torch.arange(100, 164)[None]
PROMPTS = [
    *[f"Question: What is {a} times {b}?\nAnswer:" for a, b in ((3, 4), (12, 12), (7, 9), (15, 6), (25, 8))],
    *[f"The capital of {country} is" for country in ("France", "Japan", "Brazil", "Egypt", "Canada")],
    *[f"Write a sentence about {thing}." for thing in ("rain", "bread", "the sea", "a train", "music")],
    *[
        f"<|im_start|>user\nTell me about {who}.<|im_end|>\n<|im_start|>assistant\n"
        for who in ("cats", "Rome", "atoms")
    ],
    *["def add(a, b):\n", "Once upon a time"],
]


@pytest.fixture(scope="module")
def nf4(smollm2_nf4: Path) -> Path:
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(smollm2_nf4).chat_template
    return smollm2_nf4


@pytest.fixture(scope="module")
def adapter(nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six real steps at a high rate."""
    place = tmp_path_factory.mktemp("trained")
    data = place / "data.jsonl"
    rows = [
        {"prompt": f"Question: What is {i} plus {i}?\nAnswer:", "completion": f" It is {2 * i}."} for i in range(48)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = qdora.train(
        model_name_or_path=str(nf4),
        dataset=str(data),
        output_dir=str(place / "adapter"),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    assert report.last_loss < 0.7 * report.first_loss
    return place / "adapter"


def packed_peer(nf4: Path) -> Any:
    """transformers with bitsandbytes' own linears; in eval they repack their weights on some CPUs, so never that."""
    return AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16).train()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_fresh_adapter_changes_no_logit_and_plain_transformers_agrees(nf4: Path) -> None:
    base = logits(qdora.load_model(nf4, dtype="bfloat16"))
    assert torch.equal(logits(qdora.load_model(nf4, adapter=qdora.AdapterConfig(), dtype="bfloat16")), base)
    assert torch.equal(logits(packed_peer(nf4)), base)


def test_every_magnitude_moves(nf4: Path, adapter: Path) -> None:
    for path, layer in adapted_linears(qdora.load_model(nf4, adapter=adapter)).items():
        assert layer.magnitude_offset is not None
        assert (layer.magnitude_offset != 0).float().mean() > 0.99, path


def test_our_adapter_in_peft(nf4: Path, adapter: Path) -> None:
    base, ours = logits(qdora.load_model(nf4)), logits(qdora.load_model(nf4, adapter=adapter))
    theirs = logits(PeftModel.from_pretrained(packed_peer(nf4), adapter).train())
    assert distance(ours, theirs) < 2e-2
    assert distance(base, theirs) > distance(ours, theirs)
    ours = logits(qdora.load_model(nf4, adapter=adapter, dtype="float32"))
    theirs = logits(in_fp32(PeftModel.from_pretrained(in_fp32(packed_peer(nf4)), adapter).train()))
    assert distance(ours, theirs) < 1e-4
    assert distance(base, theirs) > 2e-2


def test_a_peft_adapter_in_ours(nf4: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(packed_peer(nf4), config)
    peer(IDS, labels=IDS).loss.backward()  # one step: it takes half a minute on cores that are slow in bf16
    torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1.5e-2).step()
    peer.save_pretrained(tmp_path)
    ours, theirs = logits(qdora.load_model(nf4, adapter=tmp_path)), logits(peer)
    assert distance(ours, theirs) < 2e-2
    ours, theirs = logits(qdora.load_model(nf4, adapter=tmp_path, dtype="float32")), logits(in_fp32(peer))
    assert distance(ours, theirs) < 1e-4
    assert distance(logits(qdora.load_model(nf4)), theirs) > 2e-2


def test_the_merged_model_is_the_trained_one(nf4: Path, adapter: Path, tmp_path: Path) -> None:
    qdora.merge(nf4, adapter, tmp_path / "merged", verify=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float16
    assert len(PROMPTS) == 20
    comparison = compare(nf4, adapter, tmp_path / "merged", prompts=PROMPTS, new_tokens=12)
    assert comparison.kl_per_token <= 1e-4
    assert len(comparison.gaps_at_divergence) <= 2
    assert all(gap < 0.05 for gap in comparison.gaps_at_divergence), "a divergence that is no tie"


@pytest.mark.slow
def test_the_demo_reaches_its_aim(smollm2_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), str(smollm2_gguf), "--out", str(tmp_path / "demo")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after, merged = (float(share) for share in re.findall(r"^  (?:before|after) .*?([\d.]+) %$", printed, re.M))
    assert before < 5
    assert after > 90
    assert abs(after - merged) <= 3
    assert (tmp_path / "demo" / "adapter" / "loss.png").is_file()
