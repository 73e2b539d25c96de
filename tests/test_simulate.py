"""The ledger against torch's own record of allocations, for the parts of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cohere2Config, Gemma2Config, Gemma3TextConfig, GraniteConfig, LlamaConfig, Qwen2Config

import qdora
from qdora.architecture import hollow_model
from qdora.inject import decoder_layers
from qdora.loss import summed_nll
from qdora.optimizer import CompensatedAdamW, buckets
from qdora.simulate import (
    Batch,
    cut,
    head_is_plain,
    rehearse_step,
    simulate_loss,
    simulate_step,
    simulate_update,
    simulate_updates,
)
from qdora.workspace import CPU
from tests.conftest import make_model
from tests.families import make_family
from tests.memory import allocated_by

ADAPTER = qdora.AdapterConfig(rank=4, alpha=8)


@pytest.mark.parametrize("chunk_bytes", [2**22, 2**24])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss(chunk_bytes: int, bias: bool) -> None:
    positions, hidden, vocabulary = 1500, 64, 8000
    with torch.device("meta"):
        head = nn.Linear(hidden, vocabulary, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    weight, states = torch.randn(vocabulary, hidden).bfloat16(), torch.randn(positions, hidden).bfloat16()
    states.requires_grad_()
    bias_V = torch.zeros(vocabulary).bfloat16() if bias else None
    rows, labels = torch.arange(positions), torch.zeros(positions, dtype=torch.long)
    real = allocated_by(lambda: summed_nll(states[rows], weight, labels, bias_V, chunk_bytes))
    reckoned = simulate_loss(head, positions, chunk_bytes, CPU)
    assert reckoned == pytest.approx(real, rel=0.05)
    # the logits of a chunk, some rows of them in fp32, and the hidden states twice
    assert reckoned < chunk_bytes + 1.2 * CPU.block_bytes + 3 * states.nbytes


def test_the_update_keeps_six_bytes_a_value() -> None:
    shapes = [torch.empty(2**20, dtype=torch.bfloat16, device="meta"), torch.empty(3, 7, device="meta")]
    segment = simulate_update(lambda params: CompensatedAdamW(params, lr=1e-4), shapes)
    assert segment.start == pytest.approx(6 * 2**20, rel=0.01)
    parameter = torch.zeros(2**20, dtype=torch.bfloat16, requires_grad=True)
    optimizer = CompensatedAdamW([parameter], lr=1e-4)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    above = allocated_by(optimizer.step)
    assert segment.peak - segment.start == pytest.approx(above, rel=0.05)


def test_an_update_in_parts_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.optimizer._BUCKET_VALUES", 1000)
    sizes = [600, 300, 900, 100] * 5 + [1700, 50]
    shapes = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes]
    shapes += [torch.empty(700, device="meta")]
    parts = list(buckets(shapes))
    assert len(parts) == 13
    assert simulate_updates(CompensatedAdamW, parts) == simulate_update(CompensatedAdamW, shapes)


def deep(tmp_path: Path, layers: int, **changes: int) -> Any:
    return hollow_model(make_model(tmp_path / str(layers), num_hidden_layers=layers, **changes), ADAPTER)


def test_cut_leaves_the_last_layers(tmp_path: Path) -> None:
    model = deep(tmp_path, 7)
    last = decoder_layers(model)[-1]
    cut(model)
    assert len(decoder_layers(model)) == 3
    assert decoder_layers(model)[-1] is last
    cut(model)
    assert len(decoder_layers(model)) == 3


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step(layers: int, padded: bool, tmp_path: Path) -> None:
    model = deep(tmp_path, layers)
    before = {name: (p.shape, p.device.type) for name, p in model.named_parameters()}
    trace = simulate_step(model, Batch(2, 128, padded), CPU)
    assert {name: (p.shape, p.device.type) for name, p in model.named_parameters()} == before
    assert not any(p.grad is not None for p in model.parameters())
    assert len(trace.forward) == len(trace.backward) == layers
    if layers > 1:
        assert trace.kept_bytes == pytest.approx(2 * 128 * 64 * 2, rel=0.02)  # the layer's input, in bf16
    assert sum(trace.gradient_bytes) == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert len(trace.gradient_bytes) == layers
    assert all(segment.peak > segment.start >= 0 for segment in (*trace.forward, *trace.backward))


def test_a_rehearsal_is_one_step(tmp_path: Path) -> None:
    model, calls = deep(tmp_path, 2), []
    for number, layer in enumerate(decoder_layers(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: calls.append(number))
    rehearse_step(model, Batch(1, 8, False))
    assert calls == [0, 1, 1, 0], "forward, and recompute in the backward"
    assert not any(p.grad is not None for p in model.parameters())


def test_a_layer_that_is_not_recomputed_keeps_more(tmp_path: Path) -> None:
    model = deep(tmp_path, 3)
    lean, fat = (simulate_step(model, Batch(1, 64, False), CPU, checkpointing) for checkpointing in (True, False))
    assert fat.kept_bytes > 4 * lean.kept_bytes


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (LlamaConfig, True),
        (Qwen2Config, True),
        (Gemma3TextConfig, True),
        (Gemma2Config, False),
        (Cohere2Config, False),
        (GraniteConfig, False),
    ],
)
def test_heads_that_do_more_than_multiply(config: Any, plain: bool, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"logits_scaling": 8.0} if config is GraniteConfig else {}
    config(**shape, num_key_value_heads=2, vocab_size=4000, **extra).save_pretrained(tmp_path)
    model = hollow_model(tmp_path, ADAPTER)
    assert head_is_plain(model) is plain
    lean, own = (simulate_step(model, Batch(1, 500, False), CPU, lean_loss=lean).loss for lean in (True, False))
    assert own.peak - own.start > 500 * 4000 * 6, "all logits, in 16 bits and in fp32"
    assert lean.start == own.start


def reckoned_and_real(path: Path, adapter: qdora.AdapterConfig, dtype: str = "bfloat16") -> tuple[int, int]:
    """What a step of three layers takes by the trace, and what the real model's forward, loss and backward take."""
    hollow = hollow_model(path, adapter, dtype=dtype)
    trace = simulate_step(hollow, Batch(1, 400, False), CPU)
    model: Any = qdora.load_model(path, adapter=adapter, dtype=dtype, device="cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(400)[None]
    head = model.get_output_embeddings()

    def step() -> Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        loss = summed_nll(hidden[0, :-1], head.weight, ids[0, 1:])
        del hidden
        loss.backward()
        return loss

    step()
    model.zero_grad(set_to_none=True)
    real = allocated_by(step)
    reckoned = max(segment.peak for segment in (*trace.forward, *trace.backward))
    loss = trace.loss.start + simulate_loss(hollow.get_output_embeddings(), 399, CPU.logits_bytes, CPU)
    return max(reckoned, loss), real


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_the_step_that_runs(dtype: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", num_hidden_layers=3, hidden_size=128, intermediate_size=512)
    reckoned, real = reckoned_and_real(path, ADAPTER, dtype)
    assert reckoned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("targets", ["all-linear", ("o_proj", "experts")])
def test_a_mixture_s_step(targets: Any, tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 3, "hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 8}
    path = make_family("qwen3_moe", tmp_path / "model", **shape)
    reckoned, real = reckoned_and_real(path, qdora.AdapterConfig(rank=4, alpha=8, target_modules=targets))
    # 8 experts of like size; the choices themselves are reckoned, not known
    assert reckoned == pytest.approx(real, rel=0.05)
