"""ΔM and ΔD against the definitions in decimals of 80 digits.

Budget: 1e-9 relative, down to changes of 1e-12, whose 1 − cos is 1e-24: no cosine in fp64 shows less than 1e-16.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qdora
from qdora import AdapterConfig, CheckpointError, NumericsError
from qdora.adapterfile import LinearAdapter, read_adapter
from qdora.analysis import LinearChange, by_kind, change_of, correlation, correlations, kinds_of, layer_of, row_changes
from qdora.dense import DenseWeight
from qdora.inject import adapted_linears
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4
from tests.conftest import disturb
from tests.reference import change as reference

OUT, IN = 11, 40
RTOL = 1e-9


def weight(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(OUT, IN)


def adapter(
    size: float = 1.0, rank: int = 3, dtype: torch.dtype = torch.float32, scaling: float = 2.0
) -> LinearAdapter:
    torch.manual_seed(1)
    A, B = torch.randn(rank, IN).to(dtype), (torch.randn(OUT, rank) * size).to(dtype)
    return LinearAdapter(A, B, None, scaling)


def assert_rows_are_the_reference_s(W: torch.Tensor, lora: LinearAdapter, base: object = None) -> None:
    rows = row_changes(base or DenseWeight(W), lora)  # type: ignore[arg-type]
    magnitude, direction = reference.row_changes(W, lora.A, lora.B, lora.scaling)
    for ours, expected in ((rows.magnitude, magnitude), (rows.direction, direction)):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=RTOL, atol=0)


@pytest.mark.parametrize("size", [1e3, 1.0, 1e-2, 1e-4, 1e-7, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_of_every_size(size: float, dtype: torch.dtype) -> None:
    assert_rows_are_the_reference_s(weight(), adapter(size, dtype=dtype))


@pytest.mark.parametrize("rank", [1, 16, IN, IN + 9])
def test_ranks_up_to_more_than_the_inputs(rank: int) -> None:
    assert_rows_are_the_reference_s(weight(), adapter(1e-3, rank))


def test_rows_of_a_that_depend_on_each_other() -> None:
    lora = adapter(1e-3)
    A = torch.stack([lora.A[0], lora.A[0], torch.zeros(IN)])
    assert_rows_are_the_reference_s(weight(), LinearAdapter(A, lora.B, None, 2.0))


@pytest.mark.parametrize("growth", [1e-6, 0.5, -0.5, -3.0])
def test_rows_that_only_grow_shrink_or_turn_round(growth: float) -> None:
    """ΔV = growth·w: no turn, whatever the length, until the row points the other way."""
    W = weight()[:1]
    lora = LinearAdapter(W, torch.full((1, 1), growth), None, 1.0)
    rows = row_changes(DenseWeight(W), lora)
    growth = float(lora.B)
    expected = 2.0 if growth < -1 else 0.0
    assert float(rows.direction) == pytest.approx(expected, abs=1e-14 * growth**2)
    assert float(rows.magnitude / rows.norm) == pytest.approx(abs(1 + growth) - 1, rel=1e-9)


def test_rows_of_zeros() -> None:
    W, lora = weight(), adapter(1e-2)
    W[2], W[5] = 0, 0
    lora.B[5] = 0
    assert_rows_are_the_reference_s(W, lora)
    # a row that V loses: W = −ΔV
    lora = LinearAdapter(torch.eye(IN)[:1], torch.zeros(OUT, 1), None, 1.0)
    W[7] = 0
    W[7, 0], lora.B[7, 0] = 2.0, -2.0
    rows = row_changes(DenseWeight(W), lora)
    assert (float(rows.direction[7]), float(rows.magnitude[7])) == (1.0, -2.0)
    change = change_of("a.0.b", "b", DenseWeight(W), lora)
    assert change.delta_d == pytest.approx(1 / (OUT - 2))
    nothing = change_of("a.0.b", "b", DenseWeight(torch.zeros(OUT, IN)), adapter())
    assert (nothing.delta_d, nothing.relative_delta_m) == (0.0, None)
    assert nothing.delta_m > 0
    assert nothing.moved


def test_nf4_by_its_own_values() -> None:
    base = NF4Weight.from_tensors(quantize_nf4(weight().bfloat16()))
    assert_rows_are_the_reference_s(base.dequantize(), adapter(1e-3), base)


def test_tiles_make_no_difference() -> None:
    torch.manual_seed(0)
    W = torch.randn(2500, 16)
    lora = LinearAdapter(torch.randn(2, 16), torch.randn(2500, 2) * 1e-2, None, 0.5)
    V = W.double() + 0.5 * lora.B.double() @ lora.A.double()
    change = change_of("l.0.x", "x", DenseWeight(W), lora)
    assert change.delta_m == pytest.approx(float((V.norm(dim=1) - W.double().norm(dim=1)).abs().mean()), rel=1e-9)
    cosines = torch.nn.functional.cosine_similarity(V, W.double())
    assert change.delta_d == pytest.approx(float((1 - cosines).mean()), rel=1e-9)
    assert (change.outputs, change.magnitudes_moved, change.directions_moved) == (2500, 2500, 2500)


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_an_adapter_directory_with_patterns(use_dora: bool, use_rslora: bool, tiny_nf4: Path, tmp_path: Path) -> None:
    config = AdapterConfig(
        rank=4,
        alpha=8,
        use_dora=use_dora,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 3.0},
    )
    model = qdora.load_model(tiny_nf4, adapter=config)
    disturb(model)
    qdora.save_adapter(model, tmp_path)
    scalings = set()
    for path, linear in read_adapter(tmp_path).linears.items():
        layer = adapted_linears(model)[path]
        W = layer.base.dequantize().double()
        A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        V = W + config.scaling_of(path) * B @ A
        m = layer.magnitude().double() if use_dora else V.norm(dim=1)
        change = change_of(path, "x", layer.base, linear)
        delta_m = float((m - W.norm(dim=1)).abs().mean())
        assert change.delta_m == pytest.approx(delta_m, rel=1e-5)
        assert change.relative_delta_m == pytest.approx(delta_m / float(W.norm(dim=1).mean()), rel=1e-5)
        assert change.delta_d == pytest.approx(float((1 - torch.cosine_similarity(V, W)).mean()), rel=1e-6)
        assert change.rank == (2 if "q_proj" in path else 4)
        scalings.add(linear.scaling)
    assert len(scalings) == 3


def test_what_did_not_move() -> None:
    W = weight()
    norm, A = W.norm(dim=1), torch.randn(3, IN)
    still = torch.zeros(OUT, 3)

    def counts(B: torch.Tensor, m: torch.Tensor | None) -> tuple[int, int]:
        change = change_of("l.0.x", "x", DenseWeight(W), LinearAdapter(A, B, m, 1.0))
        assert change.moved == bool(change.magnitudes_moved or change.directions_moved)
        return change.magnitudes_moved, change.directions_moved

    assert counts(still, None) == (0, 0)
    assert counts(still, norm) == (0, 0)
    assert counts(still, norm * (1 + 3e-7)) == (0, 0)  # fp32's rounding
    one = norm.clone()
    one[4] *= 1 + 1e-5
    assert counts(still, one) == (1, 0)
    B = still.clone()
    B[3, 1] = 1e-30
    assert counts(B, norm) == (0, 1)
    assert counts(still, norm.bfloat16().float()) == (0, 0)  # another tool's, stored in bf16
    assert counts(still, (norm * 1.02).bfloat16().float()) == (OUT, 0)


def test_damage_is_named() -> None:
    W = weight()
    with pytest.raises(CheckpointError, match=r"l\.0\.x is 11×39 here and 11×40 in the adapter"):
        change_of("l.0.x", "x", DenseWeight(W[:, 1:]), adapter())
    W[3, 3] = math.nan
    with pytest.raises(NumericsError, match=r"l\.0\.x has values that are not finite"):
        change_of("l.0.x", "x", DenseWeight(W), adapter())


def points(*pairs: tuple[float, float], kind: str = "q") -> list[LinearChange]:
    return [
        LinearChange(f"l.{i}.{kind}", kind, i, 4, 8, 1.0, delta_m, delta_m, delta_d, 8, 8)
        for i, (delta_m, delta_d) in enumerate(pairs)
    ]


def test_correlation() -> None:
    assert correlation(points((1, 2), (2, 4), (3, 6))) == pytest.approx(1.0)
    assert correlation(points((1e-9, 3e-12), (2e-9, 2e-12), (3e-9, 1e-12))) == pytest.approx(-1.0)
    torch.manual_seed(0)
    values = torch.rand(20, 2, dtype=torch.float64)
    expected = float(torch.corrcoef(values.t())[0, 1])
    assert correlation(points(*map(tuple, values.tolist()))) == pytest.approx(expected)  # type: ignore[arg-type]
    for few in (points(), points((1, 2), (2, 3)), points((1, 2), (1, 3), (1, 4)), points((1, 0), (2, 0), (3, 0))):
        assert correlation(few) is None
    for part in ("magnitudes_moved", "directions_moved"):  # frozen: what it changed is rounding
        assert correlation([replace(change, **{part: 0}) for change in points((1, 2), (2, 4), (3, 6))]) is None
    both = points((1, 1), (2, 2), (3, 3)) + points((1, 1), (2, 2), kind="k")
    assert correlations(both) == {"q": pytest.approx(1.0), "k": None}
    assert [len(members) for members in by_kind(both).values()] == [3, 2]


def test_kinds_and_layers() -> None:
    llama = ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert list(kinds_of(llama).values()) == ["q_proj", "q_proj", "up_proj"]
    gpt2 = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"]
    assert list(kinds_of(gpt2).values()) == ["attn.c_proj", "mlp.c_proj", "c_fc"]
    experts = ["model.layers.2.mlp.experts.0.w1", "model.layers.2.mlp.experts.1.w1"]
    assert set(kinds_of(experts).values()) == {"w1"}
    assert [layer_of(path) for path in (*llama, experts[1], "project_in")] == [0, 11, 0, 2, None]
    assert kinds_of(["project_in"]) == {"project_in": "project_in"}
