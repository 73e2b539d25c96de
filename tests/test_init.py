"""A config that was made for the data at hand, and that trains."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import qdora
from qdora import ConfigError
from qdora.arguments import parse_train
from qdora.verbs.init import init
from tests.conftest import make_model


def test_it_is_made_for_model_and_data(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = init(tiny_nf4, pairs_file, out=tmp_path / "run.yaml")
    page = (tmp_path / "run.yaml").read_text()
    settings = yaml.safe_load(page)
    assert settings == {**report.settings, "learning_rate": 2e-4}
    assert settings["max_length"] == 64
    assert "48 rows in the prompt/completion layout" in page
    assert "99% at most" in page
    assert "quantized to NF4 each time" not in page
    run, training = parse_train([str(tmp_path / "run.yaml")])
    assert (run.early_stopping_patience, training.warmup_steps, training.load_best_model_at_end) == (3, 0.03, True)


def test_what_it_writes_trains(tiny: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "16-bit" not in str(init(tiny, pairs_file, memory="1GB", use_cpu=True))
    page = Path("qdora.yaml").read_text()
    assert f"# `qdora quantize {tiny} BASE` does that once" in page
    assert "#     base weights" in page
    report = qdora.train("qdora.yaml", max_steps=2, use_cpu=True)
    assert report is not None
    assert report.output_dir == Path("pairs-adapter")


def test_a_model_with_code_of_its_own_trains_with_that(
    tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The permission stands in the config, and the memory is reckoned with it."""
    module, trusts = sys.modules["qdora.verbs.init"], []
    reckon = module.memory_model

    def watched(run: Any, training: Any, on_accelerator: bool) -> Any:
        trusts.append(training.trust_remote_code)
        return reckon(run, training, on_accelerator)

    monkeypatch.setattr(module, "memory_model", watched)
    for trust in (True, False):
        out = tmp_path / f"{trust}.yaml"
        init(tiny_nf4, pairs_file, memory="1GB", use_cpu=True, out=out, trust_remote_code=trust)
        assert yaml.safe_load(out.read_text()).get("trust_remote_code", False) == trust
    assert trusts == [True, False]


def test_a_small_memory_changes_the_plan(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"text": "The quick brown fox jumps " * 90}) + "\n") * 20)
    wide = init(tiny_nf4, data, memory="1GB", use_cpu=True, out=tmp_path / "wide.yaml").settings
    peak = re.search(r"# +peak +([\d.]+) MB", (tmp_path / "wide.yaml").read_text())
    assert peak is not None
    memory = f"{0.9 * float(peak[1]):.2f}MB"
    narrow = init(tiny_nf4, data, memory=memory, use_cpu=True, out=tmp_path / "narrow.yaml").settings
    assert wide["per_device_train_batch_size"] == 4
    assert wide["hold_outputs"] is True
    assert narrow.items() - {**wide, "learning_rate": "2e-4"}.items()
    parse_train([str(tmp_path / "narrow.yaml")])


def test_a_handful_of_rows_and_long_ones(tiny_nf4: Path, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text((json.dumps({"text": "The quick brown fox jumps " * 500}) + "\n") * 4)
    settings = init(tiny_nf4, data, out=tmp_path / "run.yaml").settings
    assert settings["max_length"] == 512  # what the model takes
    assert "validation_split_percentage" not in settings
    parse_train([str(tmp_path / "run.yaml")])


def test_mistakes(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"there\.yaml is there already"):
        init(tiny_nf4, pairs_file, out=tmp_path / "there.yaml")
    assert (tmp_path / "there.yaml").read_text() == "mine"
    init(tiny_nf4, pairs_file, out=tmp_path / "there.yaml", overwrite=True)
    with pytest.raises(ConfigError, match="no directory"):
        init(tiny_nf4, pairs_file, out=tmp_path / "absent" / "run.yaml")
    with pytest.raises(ConfigError, match="nothing fits in 10 kB"):
        init(tiny_nf4, pairs_file, memory="10kB", use_cpu=True, out=tmp_path / "small.yaml")
    assert not (tmp_path / "small.yaml").exists()


def test_a_model_that_is_called_by_a_number(tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "135")
    report = qdora.init("135", pairs_file)
    assert yaml.safe_load(Path(report.path).read_text())["model_name_or_path"] == "135"


def test_what_is_read_is_not_written_over(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(pairs_file.read_bytes())
    with pytest.raises(ConfigError, match=r"data\.jsonl is what the run reads; name another file with --out"):
        qdora.init(tiny_nf4, data, out=data, overwrite=True)
    assert data.read_bytes() == pairs_file.read_bytes()


def test_a_directory_is_no_file_to_write(tmp_path: Path) -> None:
    for overwrite in (True, False):
        with pytest.raises(
            ConfigError, match=rf"^{tmp_path} is a directory; name the file .*, such as {tmp_path}/qdora"
        ):
            init("no model", "no data", out=tmp_path, overwrite=overwrite)
