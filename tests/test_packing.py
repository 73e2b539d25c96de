"""Rows laid end to end are the rows apart: in loss, gradients and training; and what cannot keep them apart says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import qdora
from qdora import ConfigError
from qdora.loss import IGNORED
from qdora.packing import check_rows_apart, joins_rows, rows_stay_apart, settle_packing, splits_rows
from qdora.scoring import ScoredModel
from tests.conftest import disturb
from tests.test_train import adapter_tensors, quick

# In fp32; what differs is the order in which sums over tokens are taken.
BUDGET = 1e-5
SIZES: dict[str, int] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def make_rows(lengths: tuple[int, ...] = (9, 17, 5, 12)) -> list[dict[str, list[int]]]:
    """Rows whose loss is on their second half, and one with loss on everything, its first token too."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    masked = [{"input_ids": ids, "labels": [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in rows]
    return [*masked[:-1], {"input_ids": rows[-1], "labels": rows[-1]}]


@pytest.fixture(params=["sdpa", "eager"])
def model(request: Any, tiny_nf4: Path) -> Any:
    adapter = qdora.AdapterConfig(rank=4, alpha=8, dtype="float32")
    model = qdora.load_model(tiny_nf4, adapter=adapter, dtype="float32", device="cpu").train()
    disturb(model)
    model.set_attn_implementation(request.param)
    return model


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ −log p over batches, by the loss that trains."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = ScoredModel(model)(lean=True, **batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, gradient in truth.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= BUDGET * gradient.norm(), name


def alone(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values]) for name, values in row.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_end_to_end_have_the_loss_and_gradients_of_rows_apart(model: Any, checkpointing: bool) -> None:
    rows = make_rows()
    expected, truth = loss_and_gradients(model, [alone(row) for row in rows])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # by the name that transformers 5.17 knows
    found, ours = loss_and_gradients(model, [collate(rows)])
    assert found == pytest.approx(expected, rel=BUDGET)
    assert_same_gradients(ours, truth)


def test_packs_have_the_loss_and_gradients_of_rows_apart(model: Any) -> None:
    rows = make_rows()
    expected, truth = loss_and_gradients(model, [alone(row) for row in rows])
    packs = [
        {
            "input_ids": [*a["input_ids"], *b["input_ids"]],
            "labels": [*a["labels"], *b["labels"]],
            "seq_lengths": [len(a["input_ids"]), len(b["input_ids"])],
        }
        for a, b in (rows[:2], rows[2:])
    ]
    for batches in ([collate(packs)], [collate([pack]) for pack in packs]):
        found, ours = loss_and_gradients(model, batches)
        assert found == pytest.approx(expected, rel=BUDGET)
        assert_same_gradients(ours, truth)


@torch.no_grad()
def test_a_row_has_the_same_loss_whatever_comes_before_it(model: Any) -> None:
    first, second = make_rows((9, 12))
    silent = {**first, "labels": [IGNORED] * 9}
    other = {**silent, "input_ids": [(token + 7) % 300 for token in first["input_ids"]]}
    scored = ScoredModel(model)
    losses = [float(scored(lean=True, **collate([before, second]))) for before in (silent, other)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(float(scored(lean=True, **alone(second))), rel=BUDGET)


def test_no_label_crosses_from_row_to_row() -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": [7, 8, 9]} for _ in range(3)]
    labels = collate(rows)["labels"][0]
    assert labels.tolist() == 3 * [IGNORED, 8, 9]


def build(kind: str, **changes: Any) -> ScoredModel:
    torch.manual_seed(0)
    return ScoredModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 2}),
        ("gpt2", {}),
        ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    ],
)
def test_attentions_that_read_positions_keep_rows_apart(kind: str, changes: dict[str, Any], dtype: Any) -> None:
    scored = build(kind, **changes).to(dtype).train()
    assert rows_stay_apart(scored, collate)
    check_rows_apart(scored, collate)
    assert scored.model.training
    assert all(parameter.grad is None for parameter in scored.parameters())
    assert not scored.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("falcon", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("mamba", {"state_size": 8}),
        # a layer that leaks among layers that do not
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}),
    ],
)
def test_what_lets_rows_see_each_other_is_refused(kind: str, changes: dict[str, Any], dtype: Any) -> None:
    scored = build(kind, **changes).to(dtype)
    with pytest.raises(ConfigError, match=r"rows.* leave out --packing and --padding_free"):
        check_rows_apart(scored, collate)


def test_they_are_tried_out_where_the_arithmetic_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the embedding is, which may wait on the host."""
    scored, places = build("llama"), []
    scored.model.set_output_embeddings(torch.nn.Linear(32, 99, device="meta"))
    monkeypatch.setattr("qdora.packing._on", lambda place, batch: places.append(place) or {})
    with pytest.raises(ValueError, match="input_ids"):
        rows_stay_apart(scored, collate)
    assert places == [torch.device("meta")]


def test_the_sentence_names_model_and_attention() -> None:
    with pytest.raises(
        ConfigError, match="packing would let rows see each other: FalconForCausalLM with sdpa attention"
    ):
        check_rows_apart(build("falcon"), collate)


def test_a_forward_that_does_not_know_positions_is_refused() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama").model
            self.config, self.device = self.inner.config, self.inner.device

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return self.inner.get_output_embeddings()

        def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
            return self.inner(input_ids, attention_mask)

    with pytest.raises(ConfigError, match=r"Plain does not run on rows laid end to end: .*position_ids"):
        check_rows_apart(ScoredModel(Plain()), collate)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, some of them several times as long as others."""
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    rows = [{"prompt": f"Count to {i}:", "completion": " and".join(f" {k}" for k in range(1 + i))} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ONE_STEP: dict[str, Any] = {
    "dtype": "float32",
    "adapter_dtype": "float32",
    "optim": "sgd",  # whose step is the gradient
    "learning_rate": 0.1,
    "max_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_grad_norm": 0.0,
}


def test_a_step_is_the_same_however_its_rows_are_laid(tiny_nf4: Path, mixed_file: Path, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "padded": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        "padding_free": {
            "padding_free": True,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 3,
        },
        "packed": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        "packed, evaluated apart": {
            "packing": True,
            "packing_strategy": "bfd_split",
            "eval_packing": False,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16,
        },
    }
    steps, losses = {}, {}
    for number, (name, flags) in enumerate(ways.items()):
        out = tmp_path / str(number)
        report = quick(tiny_nf4, mixed_file, out, eval_dataset=str(mixed_file), **{**ONE_STEP, **flags})
        steps[name], losses[name] = adapter_tensors(out), (report.first_loss, report.eval_loss)
    fresh = adapter_tensors_of_a_fresh_run(tiny_nf4, mixed_file, tmp_path / "fresh")
    for name in list(ways)[1:]:
        assert losses[name] == pytest.approx(losses["padded"], rel=BUDGET), name
        for key, truth in steps["padded"].items():
            moved = (truth - fresh[key]).norm()
            assert (steps[name][key] - truth).norm() <= 2 * BUDGET * moved + 1e-6 * truth.norm(), (name, key)


def adapter_tensors_of_a_fresh_run(model: Path, data: Path, out: Path) -> dict[str, torch.Tensor]:
    quick(model, data, out, eval_dataset=str(data), **{**ONE_STEP, "learning_rate": 0.0})
    return adapter_tensors(out)


def test_rows_are_cut_and_counted_as_without_packing(
    tiny_nf4: Path, mixed_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "max_length": 24}

    def counts(**more: Any) -> list[str]:
        quick(tiny_nf4, mixed_file, tmp_path / str(len(list(tmp_path.iterdir()))), **flags, **more)
        return [line for line in capsys.readouterr().out.splitlines() if "rows in the" in line]

    plain = counts()
    assert "answers cut at max_length" in plain[0]
    assert counts(padding_free=True) == plain
    assert counts(packing=True) == plain
    both = {"eval_dataset": str(mixed_file), "eval_packing": False}
    train, evaluation = counts(packing=True, packing_strategy="bfd_split", **both)
    assert "cut" not in train
    assert evaluation == f"to evaluate on, {plain[0]}"


def test_training_stops_before_rows_are_mixed_up(tmp_path: Path, mixed_file: Path, tokenizer: Any) -> None:
    base = tmp_path / "opt"
    sizes = {**SIZES, "vocab_size": len(tokenizer), "ffn_dim": 64, "word_embed_proj_dim": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for flags in ({"packing": True}, {"padding_free": True}):
        with pytest.raises(ConfigError, match="packing would let rows see each other: OPTForCausalLM"):
            quick(base, mixed_file, tmp_path / "out", max_steps=1, **flags)
    quick(base, mixed_file, tmp_path / "out", max_steps=1, save_strategy="no")


class Settings:
    """What `settle_packing` sees of TRL's settings."""

    def __init__(self, **changes: Any) -> None:
        self.packing, self.packing_strategy, self.padding_free, self.eval_packing = False, "bfd", False, None
        self.dataset_kwargs, self.max_length = None, 64
        vars(self).update(changes)


def test_wrapping_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    settle_packing(Settings(packing=True, packing_strategy="wrapped"))
    assert "a row sees those before it" in capsys.readouterr().out
    settle_packing(Settings(packing=True))
    assert capsys.readouterr().out == ""


def test_evaluation_is_not_packed_alone() -> None:
    with pytest.raises(ConfigError, match="--eval_packing true packs rows as --packing does, which is off"):
        settle_packing(Settings(eval_packing=True))


@pytest.mark.parametrize(
    ("changes", "splits", "splits_evaluation"),
    [
        ({}, False, False),
        ({"packing": True}, False, False),
        ({"packing": True, "packing_strategy": "bfd_split"}, True, True),
        ({"packing": True, "packing_strategy": "wrapped", "eval_packing": False}, True, False),
        ({"packing_strategy": "wrapped"}, False, False),
    ],
)
def test_which_rows_are_split(changes: dict[str, Any], splits: bool, splits_evaluation: bool) -> None:
    assert splits_rows(Settings(**changes)) is splits
    assert splits_rows(Settings(**changes), evaluation=True) is splits_evaluation


def test_which_rows_are_joined() -> None:
    """Those whose first token another row predicts, and which carry loss there."""
    wrapped = Settings(packing=True, packing_strategy="wrapped", eval_packing=False)
    assert joins_rows(wrapped)
    assert not joins_rows(wrapped, evaluation=True)
    for others in ({}, {"packing_strategy": "wrapped"}, {"packing": True, "packing_strategy": "bfd_split"}):
        assert not joins_rows(Settings(**others))


@pytest.mark.parametrize("wraps", [False, True])
def test_a_run_takes_its_first_labels_by_that(
    wraps: bool, tiny_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "dog"}\n' * 8)
    tokens = 8 * (len(qdora.load_tokenizer(tiny_nf4)("dog").input_ids) + 1)
    flags = {"packing": True, "packing_strategy": "wrapped"} if wraps else {}
    quick(tiny_nf4, data, tmp_path / "out", max_steps=1, max_length=8, save_strategy="no", **flags)
    assert f"{tokens} tokens, {tokens if wraps else tokens - 8} of them with loss" in capsys.readouterr().out
