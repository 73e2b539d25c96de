"""What is reckoned for a whole model against what the loaded model holds, and how plans change it.

The peaks themselves are held against real training by `scripts/check_estimate.py`, which `test_bench` runs on a small
shape.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qdora
from qdora import ConfigError
from qdora.architecture import hollow_model
from qdora.inject import adapted_linears, decoder_layers
from qdora.memory import MemoryModel
from qdora.plan import Plan, Run
from qdora.workspace import CPU
from tests.conftest import make_model

WEIGHTS = ("base weights", "embeddings and head", "norms and the rest", "adapters")
ADAPTER = qdora.AdapterConfig(rank=4, alpha=8)
PLAN = Plan(rows=2, accumulation=1, loss_chunk_bytes=2**20)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "model", tie=False, num_hidden_layers=8)


def reckoned(path: Path, adapter: qdora.AdapterConfig = ADAPTER, load_in_4bit: bool = True, **run: Any) -> MemoryModel:
    settings = {"length": 64, "workspace": CPU, **run}
    return MemoryModel(lambda: hollow_model(path, adapter, load_in_4bit=load_in_4bit), Run(**settings))


@pytest.fixture(scope="module")
def memory(path: Path) -> MemoryModel:
    return reckoned(path)


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_what_lasts_is_what_the_loaded_model_holds(in_4bit: bool, use_dora: bool, path: Path) -> None:
    adapter = qdora.AdapterConfig(rank=4, alpha=8, use_dora=use_dora)
    parts = reckoned(path, adapter, in_4bit).need(PLAN).parts
    model = qdora.load_model(path, adapter=adapter, dtype="bfloat16", device="cpu", load_in_4bit=in_4bit)
    layers = adapted_linears(model).values()
    bases = [tensor for layer in layers for tensor in [*layer.base.parameters(), *layer.base.buffers()]]
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert parts["base weights"] == sum(tensor.nbytes for tensor in bases)
    assert parts["embeddings and head"] == sum(tensor.nbytes for tensor in ends)
    trained = [p for p in model.parameters() if p.requires_grad]
    caches = 12 * sum(layer.out_features for layer in layers) if use_dora else 0
    norms = sum(layer.base_norm().nbytes for layer in layers) if use_dora else 0
    assert parts["adapters"] == sum(p.nbytes for p in trained) + norms + caches
    assert parts["optimizer state"] == pytest.approx(6 * sum(p.numel() for p in trained), rel=0.01)
    whole = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    assert sum(parts[name] for name in parts if name in WEIGHTS) == whole + caches


def test_a_nf4_checkpoint_is_reckoned_as_its_original(path: Path, tmp_path: Path, memory: MemoryModel) -> None:
    qdora.quantize(path, tmp_path / "nf4")
    assert reckoned(tmp_path / "nf4").need(PLAN) == memory.need(PLAN)


def test_streaming_leaves_two_layers(path: Path, memory: MemoryModel) -> None:
    here, streamed = memory.need(PLAN), memory.need(replace(PLAN, stream_base=True))
    model = qdora.load_model(path, adapter=ADAPTER, device="cpu", stream_base=True)
    stream = next(iter(adapted_linears(model).values())).base.stream
    assert streamed.parts["base weights"] == sum(slot.nbytes for slot in stream.slots)
    assert streamed.host_parts["base weights"] >= here.parts["base weights"]
    assert streamed.device_bytes < here.device_bytes


def test_what_each_saving_saves(memory: MemoryModel) -> None:
    here = memory.need(PLAN)
    assert here.host_bytes == 0
    parked = memory.need(replace(PLAN, activation_offloading=True))
    assert parked.host_parts == {"layer inputs": 8 * 2 * 64 * 64 * 2}
    spared = memory.need(replace(PLAN, embedding_on_host=True))
    assert memory.can_spare_embedding
    assert here.device_bytes - spared.device_bytes == spared.host_parts["embedding"] == 400 * 64 * 2
    assert "on the host" in str(spared)


def test_held_outputs_stay_on_the_device(path: Path) -> None:
    """One output of each layer's last linear, in bf16; the layers' inputs may wait on the host."""
    memory, layer = reckoned(path, length=512), 2 * 512 * 64 * 2
    assert memory.can_hold_outputs
    here, holding = (replace(PLAN, hold_outputs=hold) for hold in (False, True))
    grown = memory.need(holding).device_bytes - memory.need(here).device_bytes
    assert 6 * layer <= grown <= 8 * layer  # of eight: at the worst moment one or two may be spent
    parked = [memory.need(replace(plan, activation_offloading=True)) for plan in (here, holding)]
    assert parked[0].host_parts == parked[1].host_parts == {"layer inputs": 8 * layer}
    assert 6 * layer <= parked[1].device_bytes - parked[0].device_bytes <= 8 * layer


def test_the_head_s_own_weight_cannot_be_spared(tiny: Path) -> None:
    memory = reckoned(tiny)
    assert not memory.can_spare_embedding


@pytest.mark.parametrize("run", [{"checkpointing": False}, {"length": 128}, {"flattened": True}])
def test_what_costs_more(run: dict[str, Any], path: Path, memory: MemoryModel) -> None:
    # large enough that the optimizer's workspace is not the peak
    plan = replace(PLAN, rows=16)
    assert reckoned(path, **run).need(plan).device_bytes > memory.need(plan).device_bytes


def test_accumulated_gradients_are_there_from_the_start(path: Path) -> None:
    memory = reckoned(path, length=512)
    once, twice = memory.need(PLAN), memory.need(replace(PLAN, accumulation=2))
    assert twice.parts["gradients"] > once.parts.get("gradients", 0)


def test_gradients_are_each_module_s_own(path: Path) -> None:
    """A head that trains has one, whatever the depth; layers have theirs, which may differ."""
    batch = replace(PLAN, accumulation=2)  # all are there at the peak
    head = reckoned(path, replace(ADAPTER, modules_to_save=("lm_head",))).need(batch).parts
    plain = reckoned(path).need(batch).parts
    layer = sum(p.nbytes for p in hollow_model(path, ADAPTER).parameters() if p.requires_grad) // 8
    assert head["gradients"] - plain["gradients"] in (400 * 64 * 2, 400 * 64 * 2 + layer)
    uneven = replace(ADAPTER, rank_pattern={r"layers\.[0-4]\..*_proj": 64})
    trained = [p.nbytes for p in hollow_model(path, uneven).parameters() if p.requires_grad]
    assert sum(trained) - max(trained) * 21 <= reckoned(path, uneven).need(batch).parts["gradients"] <= sum(trained)


def test_ddp_s_buckets_are_as_large_as_the_gradients(path: Path, memory: MemoryModel) -> None:
    alone, among = memory.need(PLAN), reckoned(path, replicated=True).need(PLAN)
    trained = sum(p.nbytes for p in hollow_model(path, ADAPTER).parameters() if p.requires_grad)
    assert among.device_bytes - alone.device_bytes == among.parts["gradient buckets"] == trained
    assert "gradient buckets" not in alone.parts


@pytest.mark.parametrize(("layers", "kept"), [("[0-1]", 8), ("[5-7]", 3), ("[6-7]", 2)])
def test_layers_below_the_first_adapter_keep_nothing(layers: str, kept: int, path: Path) -> None:
    """Those above it do, adapters or not: the backward goes through them."""
    some = replace(ADAPTER, target_modules=rf".*layers\.{layers}\..*_proj")
    need = reckoned(path, some).need(replace(PLAN, activation_offloading=True))
    assert need.host_parts == {"layer inputs": kept * 2 * 64 * 64 * 2}


def test_a_run_without_adapters_in_the_layers(path: Path) -> None:
    def build() -> Any:
        return hollow_model(path, ADAPTER).requires_grad_(False)

    with pytest.raises(ConfigError, match=r"^cannot reckon a run in which no decoder layer trains$"):
        MemoryModel(build, Run(length=64, workspace=CPU))


@pytest.mark.parametrize(
    "optim",
    [
        *("adamw_8bit", "adafactor", "an_unknown_one"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("paged_adamw_32bit", "lion_8bit", "ademamix_8bit")),
    ],
)
def test_other_optimizers_by_their_state(optim: str, path: Path, memory: MemoryModel) -> None:
    trained = sum(p.numel() for p in hollow_model(path, ADAPTER).parameters() if p.requires_grad)
    state = reckoned(path, optim=optim).need(PLAN).parts.get("optimizer state", 0)
    assert 0 <= state <= 8 * trained
    assert (state == 0) is optim.startswith("paged")


def test_the_whole_depth_is_reckoned(path: Path, tmp_path: Path) -> None:
    """A model of as many layers as are simulated, and one of more: each further layer adds its own share."""
    plan = replace(PLAN, rows=8)
    shallow = make_model(tmp_path / "shallow", tie=False, num_hidden_layers=3)
    few, many = reckoned(shallow, length=256).need(plan), reckoned(path, length=256).need(plan)
    assert len(decoder_layers(hollow_model(path, ADAPTER))) == 8
    for name in ("base weights", "adapters", "optimizer state"):
        assert many.parts[name] == pytest.approx(few.parts[name] / 3 * 8, rel=0.01)
    assert many.parts["kept layer inputs"] - few.parts["kept layer inputs"] >= 0
    kept = 8 * 256 * 64 * 2
    assert many.device_bytes - few.device_bytes >= 5 * kept


def test_on_the_cpu_what_waits_on_the_host_spares_nothing(path: Path) -> None:
    here = reckoned(path, one_place=True)
    assert not here.can_offload_inputs
    assert not here.can_spare_embedding
    plain = here.need(PLAN)
    assert here.need(replace(PLAN, embedding_on_host=True)) == plain
    waiting = here.need(replace(PLAN, activation_offloading=True))
    assert waiting.host_bytes == 0
    assert waiting.device_bytes == plain.device_bytes + waiting.parts["inputs beside their copies"]
