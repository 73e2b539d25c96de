"""The contestants of `bench_step.py`: one optimizer step by each method, and the shapes they are run on.

Every method but the last two gets the same model, loss (chunked, from the last hidden states), AdamW (fused, which is
Hugging Face's default) and non-reentrant checkpointing of each decoder layer as transformers enables it, which asks for
the gradient of the embedding's output too (`qdora train` does not); adapters in bf16 on all linears, no dropout. PEFT
gets its fastest settings: no fp32 upcast of the adapters (`autocast_adapter_dtype=False`) and no
`prepare_model_for_kbit_training`, which upcasts everything that is in 16 bits. On a CPU that is slow in bf16 all
methods compute in fp32, as `qdora train` does there, and PEFT's adapters are in fp32: it multiplies in their dtype.

"held" keeps the outputs of `down_proj` from the forward on (`--hold_outputs`); "m frozen" trains A and B alone
(`--freeze magnitude`), and tells what the gradient of the magnitude costs. "own AdamW" steps with the default optimizer
of `qdora train`, which carries what rounding to bf16 takes from each value: two bytes a value more.

The last three are bounds. "dense, no adapters" is the same step of the same model in bf16, with adapters of rank 1 on
the first layer's q, k and v only, so that gradients flow as they must: what any method does, and nothing of its own.
The matmul floor is the large products of that, alone. "QDoRA's operations" are those products out of NF4 weights, with
all that QDoRA computes around them, called one after another: no autograd, no optimizer. The model without adapters,
and what these operations take beyond the matmul floor, is the least that QDoRA can take without kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from upcast import in_fp32

import qdora
from qdora.arithmetic import compute_dtype, training_dtype
from qdora.groups import MAGNITUDE, freeze_part
from qdora.inject import attach, hold_outputs
from qdora.loader import nf4_config
from qdora.loss import answer_loss
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4
from qdora.optimizer import CompensatedAdamW
from qdora.output import new_directory, write_json
from qdora.product import column_dots
from qdora.shards import ShardWriter

METHODS = {
    "qdora QDoRA": ("qdora", "nf4", True),
    "qdora QDoRA, held": ("qdora holding", "nf4", True),
    "qdora QDoRA, m frozen": ("qdora frozen", "nf4", True),
    "qdora QDoRA, own AdamW": ("qdora compensated", "nf4", True),
    "qdora QLoRA": ("qdora", "nf4", False),
    "qdora DoRA dense": ("qdora", "dense", True),
    "qdora LoRA dense": ("qdora", "dense", False),
    "PEFT QDoRA": ("peft", "nf4", True),
    "PEFT QLoRA": ("peft", "nf4", False),
    "PEFT LoRA dense": ("peft", "dense", False),
    "dense, no adapters": ("bare", "dense", False),
    "matmul floor": ("floor", "dense", False),
    "QDoRA's operations": ("operations", "nf4", True),
}
Step = Callable[[], float]
"""Runs one step and returns its loss."""
Mark = Callable[[str], None]
"""Told the name of each phase of a step as it begins, and "" at the end."""


@dataclass(frozen=True)
class Workload:
    """A model's shape and what goes through it in an optimizer step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    tied: bool = False
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.length

    @property
    def tokens_a_step(self) -> int:
        return self.micro_batches * self.tokens

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
        )

    def linears(self) -> list[tuple[str, int, int]]:
        """(name, out_features, in_features) of one decoder layer."""
        h, kv, m = self.hidden, self.hidden // self.heads * self.kv_heads, self.intermediate
        attention = [("q", h, h), ("k", kv, h), ("v", kv, h), ("o", h, h)]
        return [*attention, ("gate", m, h), ("up", m, h), ("down", h, m)]


# Two layers stand for a deep model, so the vocabulary is small in proportion: the head's share of the work is that of
# the whole model.
WORKLOADS = {
    "tiny, 64 tokens": Workload(128, 256, 2, 4, 2, 512, 1, 64),
    "tiny, 2 micro-batches of 32 tokens": Workload(128, 256, 2, 4, 2, 512, 1, 32, micro_batches=2),
    "SmolLM2-135M, 512 tokens": Workload(576, 1536, 30, 9, 3, 49152, 1, 512, tied=True),
    "SmolLM2-135M, 2048 tokens": Workload(576, 1536, 30, 9, 3, 49152, 1, 2048, tied=True),
    "7B-shaped, 2 layers, 1024 tokens": Workload(4096, 11008, 2, 32, 32, 2048, 1, 1024),
    "7B-shaped, 2 layers, 4 micro-batches of 1024 tokens": Workload(
        4096, 11008, 2, 32, 32, 2048, 1, 1024, micro_batches=4
    ),
    "8B-shaped, 2 layers, 1024 tokens": Workload(4096, 14336, 2, 32, 8, 8192, 1, 1024),
    "8B-shaped, 2 layers, 2048 tokens": Workload(4096, 14336, 2, 32, 8, 8192, 1, 2048),
    "7B, 32 layers, 2048 tokens": Workload(4096, 11008, 32, 32, 32, 32000, 1, 2048),
    **{f"8B, 32 layers, {n} x 2048 tokens": Workload(4096, 14336, 32, 32, 8, 128256, n, 2048) for n in (1, 2, 4, 8)},
}


def write_model(workload: Workload, kind: str, directory: Path) -> Path:
    """A checkpoint with random weights, dense or NF4; linears of one shape share their values."""
    config = workload.config()
    if directory.exists():
        return directory
    torch.manual_seed(0)
    cache: dict[tuple[int, ...], dict[str, Tensor]] = {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with new_directory(directory) as scratch:
        with ShardWriter(scratch, 2 * 10**9) as writer:
            for name, parameter in model.named_parameters():
                for suffix, tensor in _random(name, tuple(parameter.shape), kind, cache).items():
                    writer.add(name + suffix, tensor)
        extra = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        if kind == "nf4":
            extra["quantization_config"] = nf4_config(torch.bfloat16, skip_modules=("lm_head",)).to_dict()
        write_json(scratch / "config.json", {**config.to_dict(), **extra})
    return directory


def _random(
    name: str, shape: tuple[int, ...], kind: str, cache: dict[tuple[int, ...], dict[str, Tensor]]
) -> dict[str, Tensor]:
    if len(shape) == 1:
        return {"": torch.ones(shape, dtype=torch.bfloat16)}
    is_linear = "_proj" in name
    key = (*shape, int(is_linear))
    if key not in cache:
        weight = torch.randn(shape).mul_(0.02).bfloat16()
        parts = quantize_nf4(weight) if is_linear and kind == "nf4" else {"": weight}
        cache[key] = {f".{part}" if part else "": tensor for part, tensor in parts.items()}
    return {part: tensor.clone() for part, tensor in cache[key].items()}


def arithmetic(device: torch.device) -> torch.dtype:
    """In which every method computes."""
    return compute_dtype(training_dtype(device))


def some(*shape: int, device: torch.device) -> Tensor:
    """Random values in that."""
    return torch.randn(shape, device=device).to(arithmetic(device))


def unmarked(phase: str) -> None:
    """A mark that nobody looks at."""


def prepare(
    method: str, workload: Workload, directory: Path, rank: int, device: torch.device, mark: Mark = unmarked
) -> Callable[[], Step]:
    """Load the base model of a method; what is returned attaches the adapter, and returns the step."""
    engine, _, use_dora = METHODS[method]
    dtype = arithmetic(device)
    torch.manual_seed(0)
    shape = (workload.micro_batches, workload.batch, workload.length)
    ids = torch.randint(0, workload.vocabulary, shape, device=device)
    if engine == "floor":
        return lambda: _floor(workload, device)
    if engine == "operations":
        return lambda: _operations(workload, rank, device)
    if engine.startswith("qdora"):
        model = qdora.load_model(directory, device=device, load_in_4bit=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": device})
        model = in_fp32(model) if dtype == torch.float32 else model
    model.requires_grad_(False)

    def adapt() -> Step:
        if engine == "bare":
            adapted = _with_peft(model, 1, use_dora, target_modules=r".*layers\.0\.self_attn\.[qkv]_proj")
        elif engine == "peft":
            adapted = _with_peft(model, rank, use_dora)
        else:
            adapted = _with_qdora(model, rank, use_dora)
            hold_outputs(model, ("mlp.down_proj",) if engine == "qdora holding" else ())
            freeze_part(model, MAGNITUDE if engine == "qdora frozen" else "none")
        adapted.train()
        optimizer = (
            CompensatedAdamW(trained(adapted), lr=1e-4) if engine == "qdora compensated" else fused_adamw(adapted)
        )
        return training_step(model, optimizer, ids, mark)

    return adapt


def _with_qdora(model: Any, rank: int, use_dora: bool) -> nn.Module:
    attach(model, qdora.AdapterConfig(rank=rank, alpha=2 * rank, use_dora=use_dora))
    return model


def _with_peft(model: Any, rank: int, use_dora: bool, target_modules: str = "all-linear") -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=use_dora, target_modules=target_modules)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    return adapted


def trained(adapted: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def fused_adamw(adapted: nn.Module) -> torch.optim.Optimizer:
    """Of what trains in that."""
    return torch.optim.AdamW(trained(adapted), lr=1e-4, fused=True)


def own_adamw(adapted: nn.Module) -> torch.optim.Optimizer:
    """The default of `qdora train`, of what trains in that."""
    return CompensatedAdamW(trained(adapted), lr=1e-4)


def training_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, mark: Mark = unmarked) -> Step:
    """Forward, chunked loss and backward under checkpointing of each micro-batch, and a step of the optimizer.

    Args:
        ids: (micro-batches, batch, length).
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head, backbone = model.get_output_embeddings(), model.base_model

    def step() -> float:
        losses = []
        for rows in ids:
            mark("forward")
            hidden = backbone(input_ids=rows, use_cache=False).last_hidden_state
            mark("loss")
            loss = answer_loss(hidden, head.weight, rows) / ids.numel()
            del hidden
            mark("backward")
            loss.backward()
            losses.append(loss.detach())
        mark("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        mark("")
        return float(sum(losses))

    return step


def _floor(workload: Workload, device: torch.device) -> Step:
    """The GEMMs that a checkpointed adapter step cannot do without, on dense weights, and nothing else."""
    products = list(_products(workload))
    weights = {shape: some(*shape, device=device) for _, shape in products}
    inputs = {n: some(workload.tokens, n, device=device) for _, shape in products for n in shape}

    def step() -> float:
        for transposed, (rows, columns) in products * workload.micro_batches:
            weight = weights[rows, columns]
            torch.mm(inputs[rows], weight) if transposed else torch.mm(inputs[columns], weight.t())
        return 0.0

    return step


class _Operands:
    """What one linear computes with."""

    def __init__(self, packed: dict[str, Tensor], rank: int, needs_dx: bool, device: torch.device) -> None:
        self.weight = NF4Weight.from_tensors({name: tensor.to(device, copy=True) for name, tensor in packed.items()})
        rows, columns = self.weight.out_features, self.weight.in_features
        self.dtype = arithmetic(device)
        self.A, self.B = (some(*shape, device=device) for shape in ((rank, columns), (rows, rank)))
        self.c, self.needs_dx = torch.ones(rows, device=device), needs_dx

    def norm(self) -> None:
        for _, tile in self.weight.tiles(self.dtype):
            tile @ self.A.t()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.low_rank(x)
        return self.weight.linear(x, self.c).addmm_(h, self.B.t()), h

    def low_rank(self, x: Tensor) -> Tensor:
        return x @ self.A.t()

    def backward(self, x: Tensor, h: Tensor, y: Tensor, g: Tensor) -> None:
        dh = g @ self.B
        dh.t() @ x, g.t() @ h, column_dots(g, y, self.c)
        if self.needs_dx:
            self.weight.linear_transposed(g, self.c).addmm_(dh, self.A)


def _operations(workload: Workload, rank: int, device: torch.device) -> Step:
    """What QDoRA with held outputs computes in the linears and the head, one operation after another."""
    sizes = {size for _, rows, columns in workload.linears() for size in (rows, columns)}
    inputs = {size: some(workload.tokens, size, device=device) for size in sizes}
    packed = {(o, i): quantize_nf4(torch.randn(o, i).mul_(0.02).bfloat16()) for _, o, i in workload.linears()}
    layers = [
        [_Operands(packed[o, i], rank, _needs_dx(layer, name), device) for name, o, i in workload.linears()]
        for layer in range(workload.layers)
    ]
    linears = [linear for layer in layers for linear in layer]
    head = some(workload.vocabulary, workload.hidden, device=device)
    logits = some(workload.tokens, workload.vocabulary, device=device)

    def micro_batch() -> None:
        for linear in linears:
            linear.forward(inputs[linear.weight.in_features])
        inputs[workload.hidden] @ head.t(), logits @ head
        for layer in reversed(layers):
            kept = [linear.forward(inputs[linear.weight.in_features]) for linear in layer[:-1]]
            kept.append((inputs[workload.hidden], layer[-1].low_rank(inputs[workload.intermediate])))
            for linear, (y, h) in zip(reversed(layer), reversed(kept), strict=True):
                linear.backward(inputs[linear.weight.in_features], h, y, inputs[linear.weight.out_features])

    def step() -> float:
        for linear in linears:
            linear.norm()
        for _ in range(workload.micro_batches):
            micro_batch()
        return 0.0

    return step


def _products(workload: Workload) -> Iterator[tuple[bool, tuple[int, int]]]:
    """(transposed, (out, in)) of each: forward, recompute, and gradient of the input where one is needed."""
    for layer in range(workload.layers):
        for name, rows, columns in workload.linears():
            yield from [(False, (rows, columns))] * 2
            if _needs_dx(layer, name):
                yield True, (rows, columns)
    head = (workload.vocabulary, workload.hidden)
    yield from [(False, head), (True, head)]


def _needs_dx(layer: int, name: str) -> bool:
    return layer > 0 or name not in ("q", "k", "v")  # nothing before the first layer trains


def floor_flops(workload: Workload) -> float:
    """Floating-point operations of the floor."""
    return sum(2.0 * workload.tokens_a_step * rows * columns for _, (rows, columns) in _products(workload))
