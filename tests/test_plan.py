"""Plans as flags, needs as a table, batches as the model sees them."""

from __future__ import annotations

from qdora.plan import Need, Plan, Run
from qdora.shards import parse_size
from qdora.simulate import Batch
from qdora.workspace import CPU


def test_a_plan_s_flags_name_what_is_on() -> None:
    plan = Plan(rows=2, accumulation=3, loss_chunk_bytes=16 * 2**20, hold_outputs=True, stream_base=True)
    assert plan.flags() == (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 3 --loss_chunk_size 16MiB "
        "--hold_outputs true --stream_base true"
    )


def test_a_chunk_that_is_no_whole_number_of_mib_keeps_its_bytes() -> None:
    for size in (500_000, 20_000_000, 2**20 + 1):
        flag = Plan(rows=1, accumulation=1, loss_chunk_bytes=size).flags().split("--loss_chunk_size ")[1]
        assert parse_size(flag) == size


def test_a_need_is_the_sum_of_its_parts() -> None:
    need = Need({"base weights": 3000, "loss": 500}, "in the loss", {"embedding": 7000})
    assert (need.device_bytes, need.host_bytes) == (3500, 7000)
    assert str(need).splitlines() == [
        "  base weights      3 kB",
        "  loss             500 B",
        "  peak            3.5 kB   in the loss",
        "  on the host       7 kB",
    ]


def test_batches() -> None:
    run = Run(length=10, workspace=CPU)
    assert run.batch(1) == Batch(1, 10, padded=False)
    assert run.batch(3) == Batch(3, 10, padded=True)
    assert Run(length=10, workspace=CPU, filled=True).batch(3) == Batch(3, 10, padded=False)
    assert Run(length=10, workspace=CPU, flattened=True).batch(3) == Batch(1, 30, padded=False, packed=True)
