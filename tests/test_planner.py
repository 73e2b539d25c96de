"""Which plan is taken, on made-up needs where the answer is plain, and on a real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdora import ConfigError
from qdora.arguments import flags_of, parse_estimate
from qdora.plan import Need, Plan
from qdora.planner import _plans, adopt, asked_plan, choose, memory_model, usable_bytes
from tests.conftest import make_model

MB = 2**20
ASKED = Plan(rows=4, accumulation=2, loss_chunk_bytes=32 * MB)


class MadeUp:
    """Every saving saves a round sum: 1,000 for the base, 100 a row, 2 a MiB of chunk, 50 for the embedding."""

    def __init__(
        self, can_spare_embedding: bool = True, can_offload_inputs: bool = True, can_hold_outputs: bool = True
    ) -> None:
        self.can_spare_embedding, self.can_offload_inputs = can_spare_embedding, can_offload_inputs
        self.can_hold_outputs = can_hold_outputs

    def need(self, plan: Plan) -> Need:
        parts = {
            "base": 100 if plan.stream_base else 1000,
            "rows": plan.rows * (70 if plan.activation_offloading else 100),
            "loss": plan.loss_chunk_bytes // MB * 4,
            "embedding": 0 if plan.embedding_on_host else 50,
            "outputs": 30 * plan.rows * plan.hold_outputs,
        }
        return Need(parts, "always", {})


ON_HOST = {"activation_offloading": True, "embedding_on_host": True}


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        (1578, {}),
        (1577, {"loss_chunk_bytes": 16 * MB}),
        (1513, {"activation_offloading": True}),
        (1457, {"activation_offloading": True, "loss_chunk_bytes": 16 * MB}),
        (1393, {"loss_chunk_bytes": 16 * MB, **ON_HOST}),
        (1343, {"loss_chunk_bytes": 4 * MB, **ON_HOST}),
        (1295, {"rows": 2, "accumulation": 4, "loss_chunk_bytes": 16 * MB, "activation_offloading": True}),
        (1100, {"rows": 1, "accumulation": 8, "loss_chunk_bytes": 4 * MB, **ON_HOST}),
        (678, {"stream_base": True}),
        (186, {"rows": 1, "accumulation": 8, "loss_chunk_bytes": 4 * MB, **ON_HOST, "stream_base": True}),
    ],
)
def test_the_fastest_that_fits(limit: int, changes: dict[str, Any]) -> None:
    plan, need = choose(MadeUp(), ASKED, limit)
    assert plan == replace(ASKED, **changes)
    assert need == MadeUp().need(plan)
    assert need.device_bytes <= limit


def test_what_turns_out_not_to_be_needed_is_left_out() -> None:
    class ChunksSaveNothing(MadeUp):
        def need(self, plan: Plan) -> Need:
            return super().need(replace(plan, loss_chunk_bytes=MB))

    plan, _ = choose(ChunksSaveNothing(), ASKED, 1400)
    assert plan == replace(ASKED, activation_offloading=True)


def test_what_was_asked_for_stays() -> None:
    asked = Plan(rows=2, accumulation=1, loss_chunk_bytes=2 * MB, stream_base=True, activation_offloading=True)
    assert choose(MadeUp(), asked, 10**6)[0] == asked


def test_held_outputs_are_let_go_after_the_chunks_shrink() -> None:
    asked = replace(ASKED, hold_outputs=True)
    for limit, changes in (
        (1698, {}),
        (1697, {"loss_chunk_bytes": 16 * MB}),
        (1633, {"hold_outputs": False}),
        (1577, {"loss_chunk_bytes": 16 * MB, "hold_outputs": False}),
    ):
        assert choose(MadeUp(), asked, limit)[0] == replace(asked, **changes)
        assert choose(MadeUp(), ASKED, limit, may_hold_outputs=True)[0] == replace(asked, **changes)


def test_outputs_are_held_only_where_that_spares_something() -> None:
    plan, _ = choose(MadeUp(can_hold_outputs=False), ASKED, 10**6, may_hold_outputs=True)
    assert plan == ASKED


def test_outputs_are_held_again_beside_what_waits_on_the_host() -> None:
    class SmallOutputs(MadeUp):
        def need(self, plan: Plan) -> Need:
            need = super().need(plan)
            return replace(need, parts={**need.parts, "outputs": 10 * plan.rows * plan.hold_outputs})

    plan, _ = choose(SmallOutputs(), ASKED, 1457, may_hold_outputs=True)
    assert plan == replace(ASKED, loss_chunk_bytes=16 * MB, activation_offloading=True, hold_outputs=True)


@pytest.mark.parametrize(("rows", "accumulation", "fewer"), [(5, 1, 1), (5, 2, 2), (15, 1, 5), (7, 3, 3), (8, 1, 4)])
def test_an_uneven_batch_keeps_its_rows(rows: int, accumulation: int, fewer: int) -> None:
    asked = Plan(rows=rows, accumulation=accumulation, loss_chunk_bytes=32 * MB)
    found = {plan.rows: plan.rows * plan.accumulation for plan in _plans(asked, MadeUp())}
    assert set(found.values()) == {rows * accumulation}
    assert list(found)[1] == fewer
    assert 1 in found


def test_what_cannot_be_spared_stays() -> None:
    for limit in range(270, 1600, 40):
        assert not choose(MadeUp(can_spare_embedding=False), ASKED, limit)[0].embedding_on_host
        assert not choose(MadeUp(can_offload_inputs=False), ASKED, limit)[0].activation_offloading


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits in 100 B: the least is 186 B, by --per_device_train_batch_s"):
        choose(MadeUp(), ASKED, 100)


def test_what_is_usable() -> None:
    assert usable_bytes("8GB", on_accelerator=False) == 8 * 10**9
    assert usable_bytes("8GB", on_accelerator=True) == 8 * 10**9 - 8 * 10**9 * 3 // 100 - 500 * 10**6
    for wrong in ("400MB", "much", "0"):
        with pytest.raises(ConfigError):
            usable_bytes(wrong, on_accelerator=True)


def parsed(model: Path, **flags: Any) -> tuple[Any, Any]:
    return parse_estimate(flags_of({"model_name_or_path": model, "use_cpu": True, "max_length": 64, **flags}))


def test_a_real_model_and_its_flags(tmp_path: Path) -> None:
    """The less there is, the more is saved, and the flags that are printed ask for just that plan."""
    model = make_model(tmp_path / "model", tie=False, num_hidden_layers=6)
    run, training = parsed(model, lora_r=2, per_device_train_batch_size=16)
    reckoned, asked = memory_model(run, training, on_accelerator=False), asked_plan(run, training, on_accelerator=False)
    limit = reckoned.need(asked).device_bytes
    seen = []
    while True:
        try:
            plan, need = choose(reckoned, asked, limit)
        except ConfigError:
            break
        seen.append(plan)
        again = parsed(model, lora_r=2, **dict(zip(*[iter(plan.flags().replace("--", "").split())] * 2, strict=True)))
        assert asked_plan(*again, on_accelerator=False) == plan
        limit = need.device_bytes - 1
    assert seen[0] == asked
    assert len(seen) > 3
    assert seen[-1].rows < asked.rows
    assert seen[-1].stream_base
    adopt(seen[-1], run, training)
    assert asked_plan(run, training, on_accelerator=False) == seen[-1]


def test_rows_of_any_length_cannot_be_reckoned(tiny: Path) -> None:
    run, training = parsed(tiny)
    training.max_length = None
    with pytest.raises(ConfigError, match="must be known"):
        memory_model(run, training, on_accelerator=False)


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_what_keeps_more_than_is_reckoned(name: str, tiny_nf4: Path) -> None:
    run, training = parse_estimate(["--model_name_or_path", str(tiny_nf4)])
    setattr(training, name, {"every_n_layers": 3})
    with pytest.raises(ConfigError, match="leave every_n_layers out"):
        memory_model(run, training, on_accelerator=False)
