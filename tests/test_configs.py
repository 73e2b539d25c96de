"""The ready configs: each is valid, and does on a tiny model what its comments say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qdora
from qdora.arguments import parse_train
from tests.conftest import make_model

CONFIGS = sorted((Path(__file__).parents[1] / "scripts" / "configs").glob("*.yaml"))


def test_there_is_one_for_each_need() -> None:
    assert {path.stem for path in CONFIGS} == {"chat", "text", "tiny-gpu", "several-gpus"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding can wait on the host."""
    return make_model(tmp_path_factory.mktemp("untied") / "model", tie=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_trains(config: Path, untied: Path, tmp_path: Path) -> None:
    parse_train([str(config)])
    data = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "12 apples"}]}
    row = {"text": "The quick brown fox jumps over the lazy dog. " * 3} if config.stem == "text" else chat
    data.write_text((json.dumps(row) + "\n") * 40)
    report = qdora.train(
        config,
        model_name_or_path=str(untied),
        dataset=str(data),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        max_length=64,
        use_cpu=True,
        fsdp=False,  # in one process there is nothing to shard over
    )
    assert report is not None
    assert report.steps == 2
    assert report.best_step is not None
