"""Base, adapter and merged model side by side."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import qdora
from qdora import CheckpointError, ConfigError, DataError, NumericsError
from qdora.choices import choice_rows
from qdora.rows import read_rows
from qdora.verbs.evaluate import EvaluateReport, _choice_data, evaluate
from tests.conftest import make_model, make_tokenizer
from tests.test_numerics import spoil


@pytest.fixture(scope="module")
def merged(tiny_nf4: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "merged"
    qdora.merge(tiny_nf4, tiny_adapter, out, verify=False)
    return out


def run(model: Path, data: Path, **settings: object) -> EvaluateReport:
    return evaluate(model, data, **{"device": "cpu", "dtype": "float32", **settings})  # type: ignore[arg-type]


def test_side_by_side(tiny_nf4: Path, tiny_adapter: Path, merged: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = run(tiny_nf4, pairs_file, adapter=tiny_adapter, merged=merged, exact_match_rows=5)
    base, adapter, plain = (report.models[name] for name in ("base", "adapter", "merged"))
    assert adapter.loss == pytest.approx(plain.loss, abs=2e-3)
    assert abs(base.loss - adapter.loss) > 0.02
    assert base.perplexity == pytest.approx(math.exp(base.loss))
    assert (report.answered, report.choice_questions) == (5, 0)
    assert base.exact_match is not None
    assert base.choice_accuracy is None
    head = str(report).splitlines()[1]
    assert head.split() == ["base", "adapter", "merged"]
    assert json.loads(json.dumps(report.to_dict()))["models"]["base"]["loss"] == base.loss


def test_it_measures_what_training_improves(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    trained = qdora.train(
        model_name_or_path=str(tiny_nf4),
        dataset=str(pairs_file),
        eval_dataset=str(pairs_file),
        output_dir=str(tmp_path / "adapter"),
        max_steps=12,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        use_cpu=True,
        dtype="float32",
    )
    assert trained is not None
    report = run(tiny_nf4, pairs_file, adapter=tmp_path / "adapter", exact_match_rows=0)
    assert report.models["adapter"].loss < 0.7 * report.models["base"].loss
    assert report.models["adapter"].loss == pytest.approx(trained.eval_loss, rel=1e-4)


def test_multiple_choice(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "choices.jsonl"
    rows = [
        {
            "prompt": "Question: 1 and 2? Answer:",
            "completion": " 3",
            "choices": [" 3", " 4", " user assistant content"],
        },
        {
            "prompt": "Question: 2 and 2? Answer:",
            "completion": " 4",
            "choices": [" 3", " 4", " user assistant content"],
        },
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tiny_nf4, data, exact_match_rows=0)
    assert report.choice_questions == 2
    assert report.models["base"].choice_accuracy in (0.0, 0.5)  # it cannot find both without knowing how to add
    assert "multiple choice of 2" in str(report)
    with pytest.raises(DataError, match="do not fit in max_length"):
        run(tiny_nf4, data, max_length=12)


def test_mistakes(tiny_nf4: Path, pairs_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is in NF4, so it is no merged model"):
        run(tiny_nf4, pairs_file, merged=tiny_nf4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "per_device_eval_batch_size must be at least 1, found 0"),
        ({"batch_size": -1}, "per_device_eval_batch_size must be at least 1, found -1"),
        ({"max_rows": 0}, "max_rows must be at least 1, found 0"),
        ({"max_length": -1}, "max_length must be at least 1, found -1"),
        ({"exact_match_rows": -2}, "exact_match must be at least 0, found -2"),
    ],
)
def test_counts_that_are_none(settings: dict[str, int], message: str, tiny: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        qdora.evaluate(tiny, pairs_file, **settings)


def test_choices_are_compared_by_their_own_words(tiny: Path, tmp_path: Path) -> None:
    def asked(first: str) -> Path:
        turns = [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "2?"},
        ]
        rows = [
            {
                "messages": [*turns, {"role": "assistant", "content": f"{n}"}],
                "choices": [f"{n}", f"{n} and {n} and more"],
            }
            for n in range(6)
        ]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "a.jsonl"

    data = asked("word " * 30)
    exam = _choice_data(choice_rows(read_rows(data), data), qdora.load_tokenizer(tiny), None, data)
    for number, variants in enumerate(exam):
        for ids, labels, text in zip(variants.input_ids, variants.labels, (f"{number}", f"{number} and"), strict=True):
            kept = [label for label in labels if label != -100]
            assert qdora.load_tokenizer(tiny).decode(kept).startswith(text)
            assert len(kept) < len(ids) / 4


def test_what_precedes_a_choice_counts_for_all_of_them(tiny: Path, tmp_path: Path) -> None:
    """Of one choice a token holds the space before it, of another the space is a token of the prompt."""
    data, tokenizer = tmp_path / "a.jsonl", qdora.load_tokenizer(tiny)
    row = {"prompt": "Answer: ", "completion": "one", "choices": ["one", "9"]}
    data.write_text(json.dumps(row) + "\n")
    ((variants),) = _choice_data(choice_rows(read_rows(data), data), tokenizer, None, data)
    begins = {next(i for i, label in enumerate(labels) if label != -100) for labels in variants.labels}
    assert len(begins) == 1
    (first,) = begins
    assert len({tuple(ids[:first]) for ids in variants.input_ids}) == 1


def test_another_chat_template(tiny: Path, tmp_path: Path) -> None:
    data, template = tmp_path / "a.jsonl", tmp_path / "t.jinja"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "42 apples"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    own, other = (run(tiny, data, exact_match_rows=0, chat_template_path=path) for path in (None, template))
    assert own.data != other.data
    template.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        run(tiny, data, chat_template_path=template)


def test_a_model_whose_loss_is_not_finite_has_no_figures(tmp_path: Path, pairs_file: Path) -> None:
    model = spoil(make_model(tmp_path / "m"), "model.norm.weight", float("nan"))
    with pytest.raises(NumericsError, match="the loss of base is not finite"):
        qdora.evaluate(model, pairs_file, exact_match_rows=0)


def test_an_adapter_s_tokenizer_without_a_pad_token(
    tiny: Path, tiny_adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(adapter)
    report = qdora.evaluate(tiny, pairs_file, adapter, exact_match_rows=3, max_rows=4)
    assert report.answered == 3
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(9)])
    tokenizer.save_pretrained(adapter)
    # Some real models have no embeddings of tokens that they never use.
    assert qdora.evaluate(tiny, pairs_file, adapter, exact_match_rows=3, max_rows=4).models == report.models
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Q", "completion": "<extra-0>"}\n')
    with pytest.raises(CheckpointError, match=r"of the adapter gives token \d+ \('<extra-0>'\), and the model has"):
        qdora.evaluate(tiny, data, adapter, exact_match_rows=3, max_rows=4)
