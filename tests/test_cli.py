"""The command as people run it: verbs end to end, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdora import cli
from qdora.cli import main
from tests.conftest import make_model


def test_the_three_verbs(tiny: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nf4, adapter, merged = (str(tmp_path / name) for name in ("nf4", "adapter", "merged"))
    assert main(["quantize", str(tiny), nf4, "--max_shard_size", "1MB"]) == 0
    assert f"next: qdora init {nf4} DATA.jsonl" in capsys.readouterr().out
    flags = ["--max_steps", "2", "--lora_r", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    data = ["--dataset", str(pairs_file), "--output_dir", adapter]
    assert main(["train", "--model_name_or_path", nf4, *data, *flags]) == 0
    out = capsys.readouterr().out
    assert f"next: qdora chat {nf4} --adapter {adapter} --compare" in out
    assert f"qdora merge {nf4} {adapter} OUT" in out
    assert main(["merge", nf4, adapter, merged, "--dtype", "bfloat16", "--no-verify"]) == 0
    assert "14 linears merged" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "nf4"]


@pytest.fixture
def place(tmp_path: Path, tiny: Path, tiny_nf4: Path, tiny_adapter: Path) -> Path:
    """A directory with good things and damaged ones."""
    for name, source in (("model", tiny), ("nf4", tiny_nf4), ("adapter", tiny_adapter)):
        shutil.copytree(source, tmp_path / name)
    shutil.copytree(tiny_nf4, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    shutil.copytree(tiny, tmp_path / "short")
    shard = sorted((tmp_path / "short").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    shutil.copytree(tiny, tmp_path / "nonsense")
    (tmp_path / "nonsense" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "many"}')
    make_model(tmp_path / "part", num_hidden_layers=1)
    config = (tmp_path / "part" / "config.json").read_text()
    (tmp_path / "part" / "config.json").write_text(
        config.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2').replace('"layer_types": [', '"unused": [')
    )
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_text("GGUF")
    make_model(tmp_path / "other", hidden_size=128)
    good = '{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "good.jsonl").write_text(good * 4)
    (tmp_path / "row17.jsonl").write_text(good * 16 + '{"prompt": "a"}\n')
    (tmp_path / "layout.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "masked.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return tmp_path


TRAIN = "train --model_name_or_path nf4 --dataset good.jsonl --output_dir out"
MISTAKES = [
    ("quantize absent out", "no model at absent"),
    ("quantize empty out", "no config.json"),
    ("quantize short out", "damaged or cut short"),
    ("quantize nf4 out", "in NF4 already"),
    ("quantize model out --max_shard_size big", "not a size: 'big'"),
    ("quantize model", "the following arguments are required: OUT"),
    ("quantize model adapter", "not empty"),
    ("quantise model out", "unknown verb 'quantise'; did you mean quantize?"),
    ("merge nf4 adapter out --onto_orignal", "unknown flag --onto_orignal; did you mean --onto_original?"),
    ("merge other adapter out", "the adapter is for another model"),
    ("merge nf4 model out", "model is not an adapter"),
    ("merge adapter adapter out", "is an adapter, not a model"),
    ("merge cut adapter out", "damaged or cut short"),
    (TRAIN + " --learing_rate 1", "did you mean --learning_rate?"),
    (TRAIN.replace("nf4", "cut"), "damaged or cut short"),
    (TRAIN.replace("nf4", "empty"), "no config.json"),
    (TRAIN.replace("good", "absent"), "no data file at absent.jsonl"),
    (TRAIN.replace("good", "layout"), "no known layout"),
    (TRAIN.replace("good", "masked"), "every label would be masked"),
    (TRAIN.replace("good", "row17"), "row 17: the field 'completion' is missing"),
    (TRAIN.replace("--output_dir out", ""), "missing: --output_dir"),
    (TRAIN + " --lora_target_modules qq_proj", "did you mean q_proj?"),
    (TRAIN + " --freeze magnitudes", "found 'magnitudes'; did you mean magnitude?"),
    (TRAIN + " --use_dora false --freeze magnitude", "there is none to freeze"),
    (TRAIN + " --init_lora_weights loftq", "name the 16-bit original with --original_model_name_or_path"),
    (TRAIN + " --eval_dataset good.jsonl --validation_split_percentage 5", "choose one"),
    (TRAIN + " --early_stopping_patience 2", "needs evaluations"),
    (TRAIN + " --lr_scheduler_type cosin", "did you mean cosine?"),
    (TRAIN + " --report_to tensorbord", "tensorbord is not supported"),
    (TRAIN + " --lora_r 0", "rank must be"),
    (TRAIN + " --eval_strategy steps", "needs an --eval_dataset"),
    (TRAIN + " --optim adamm", "--optim knows no 'adamm'; did you mean adamw_torch?"),
    (TRAIN + " --per_device_train_batch_size 0", "batch"),
    (TRAIN + " --truncation_mode keep_end", "only keep_start fits"),
    (TRAIN + " --max_length 0", "--max_length must be at least 1"),
    (TRAIN.replace("--output_dir out", "--output_dir good.jsonl/out"), "is a file or in one"),
    (TRAIN.replace("--output_dir out", "--output_dir model"), "holds a model"),
    (TRAIN + " --resume_from_checkpoint run/checkpoint-1", "checkpoint-1 is damaged or cut short"),
    (TRAIN + " --chat_template_path absent.jinja", "no chat template at"),
    ("quantize model model --overwrite", "is or holds the input"),
    ("quantize model . --overwrite", "is or holds the input"),
    ("quantize model out --device tpu0", "no device 'tpu0' here"),
    ("quantize model out --skip_modules [", "neither a name nor a regular expression"),
    ("quantize model out --dtype float32", "dtype must be one of bfloat16, float16"),
    ("quantize nonsense out", "nonsense has no usable config.json"),
    ("quantize part out", "does not hold the model of its config.json"),
    (TRAIN.replace("nf4", "part"), "does not hold the model of its config.json"),
    ("merge nf4 adapter empty/../nf4 --overwrite", "is or holds the input"),
    ("train absent.yaml", "no config file at absent.yaml"),
    (TRAIN.replace("nf4", "adapter"), "is an adapter, not a model"),
    ("evaluate nf4 --dataset absent.jsonl", "no data file at absent.jsonl"),
    ("evaluate adapter --dataset good.jsonl", "is an adapter, not a model"),
    ("evaluate nf4 --adapter model --dataset good.jsonl", "model is not an adapter"),
    ("evaluate nf4 --merged nf4 --dataset good.jsonl", "is in NF4, so it is no merged model"),
    ("evaluate nf4 --dataset good.jsonl --output_file absent/f.json", "cannot write absent/f.json"),
    ("evaluate nf4 --dataset good.jsonl --output_file good.jsonl", "good.jsonl is there already"),
    ("evaluate nf4 --dataset good.jsonl --output_file nf4/config.json", "nf4/config.json is there already"),
    ("inspect adapter --output_file adapter/adapter_model.safetensors", "is there already, and is no earlier one"),
    ("inspect adapter --output_file adapter/adapter_config.json", "is there already, and is no earlier one"),
    ("inspect adapter --picture absent/p.png", "which is no directory; choose another --picture"),
    ("chat nf4 --adapter nf4 --prompt a", "is not an adapter"),
    ("chat other --adapter adapter --prompt a", "the adapter is for another model"),
    ("inspect nf4", "is not an adapter"),
    ("inspect adapter --base other", "the adapter is for another model"),
    ("init absent good.jsonl", "no model at absent: expected a directory with config.json, or a Hub id (owner/name)"),
    ("init adapter good.jsonl", "adapter is an adapter, not a model; name the model it was trained on"),
    ("estimate absent", "no model at absent: expected a directory"),
    ("estimate empty", "empty is not a model directory: it has no config.json"),
    ("estimate model.gguf", "model.gguf is a model in GGUF; quantize it first: qdora quantize model.gguf OUT"),
    ("train --model_name_or_path model.gguf --dataset good.jsonl --output_dir out", "quantize it first"),
    ("init nf4 absent.jsonl", "no data file at absent.jsonl"),
    ("init nf4 good.jsonl --memory lots", "not a size: 'lots'"),
    ("init nf4 good.jsonl --out good.jsonl", "good.jsonl is what the run reads; name another"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(
    command: str,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.rglob("*"))
    assert main(command.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qdora: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in place.rglob("*")) == before


def test_the_readme_s_mistakes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command there prints the line that stands below it."""
    monkeypatch.chdir(place)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (usual,) = re.findall(r"\(`…` stands for\n`(.*?)`\)", readme)
    (block,) = re.findall(r"their lines</summary>\n\n```text\n(.*?)\n```", readme, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 40
    for command, expected in zip(lines[::2], lines[1::2], strict=True):
        assert main(command.removeprefix("$ qdora ").replace("…", usual).split()) == 2, command
        assert capsys.readouterr().err.strip().splitlines()[-1] == expected


def test_figures_go_to_a_file_and_over_earlier_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for command in ("evaluate nf4 --dataset good.jsonl --exact_match 0", "inspect adapter --base nf4"):
        file = f"{command.split()[0]}.json"
        for _ in range(2):
            assert main([*command.split(), "--output_file", file]) == 0, capsys.readouterr().err
        assert json.loads((place / file).read_text())
    assert main(["inspect", "adapter", "--output_file", "evaluate.json"]) == 2
    assert "evaluate.json is there already" in capsys.readouterr().err


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nof 1 GiB")

    monkeypatch.setitem(cli._VERBS, "quantize", full)
    assert main(["quantize", "a", "b"]) == 2
    assert capsys.readouterr().err.startswith("qdora: out of memory: tried to allocate 2 GiB of 1 GiB; a smaller")


def test_a_place_that_is_none_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_long = tmp_path / ("x" * 300)
    for arguments in (
        ["quantize", tiny, too_long],
        ["quantize", too_long, tmp_path / "out"],
        ["merge", tiny, too_long, tmp_path / "out"],
        ["inspect", too_long],
    ):
        assert main(list(map(str, arguments))) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qdora: "), line
        assert "File name too long" in line, line
        assert str(too_long) in line, line


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "none", "ours"), PermissionError("of nothing")):

        def fails(*_: object, error: OSError = error, **__: object) -> None:
            raise error

        monkeypatch.setitem(cli._VERBS, "quantize", fails)
        with pytest.raises(type(error)):
            main(["quantize", "a", "b"])


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qdora", "quantize", str(tmp_path / "absent"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("qdora: no model at")
    assert done.stderr.count("\n") == 1


def shell(command: str, **environment: str) -> tuple[int, str]:
    """The exit status and what the program itself says on standard error, in a shell's line that calls it `qdora`."""
    program = f"{shlex.quote(sys.executable)} -m qdora"
    line = ["bash", "-c", f"set -o pipefail; {command.replace('qdora', program, 1)}"]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, check=False, env={**known, **environment})
    bitsandbytes = "Failed to load CPU gemm_4bit_forward"  # as it is imported, on some machines
    lines = [line for line in done.stderr.splitlines() if not line.startswith(bitsandbytes)]
    return done.returncode, "\n".join(lines)


@pytest.mark.parametrize("verb", ["--help", "train --help", "completion bash"])
def test_an_output_that_nobody_reads(verb: str) -> None:
    assert shell(f"qdora {verb} | true") in [(141, ""), (0, "")]  # by who is first


@pytest.mark.parametrize("verb", ["--help", "completion bash"])
def test_an_output_that_cannot_be_written(verb: str) -> None:
    line = "qdora: cannot write to standard output: No space left on device; send it somewhere else"
    assert shell(f"qdora {verb} > /dev/full") == (2, line)
    assert shell(f"qdora {verb} > /dev/full", PYTHONUNBUFFERED="1") == (2, line)


def test_streams_that_are_closed() -> None:
    assert shell("qdora completion bash >&-") == (0, "")
    assert shell("qdora --help <&- >&- 2>&-") == (0, "")


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            SEND
signal.signal(signal.SIGINT, signal.default_int_handler)
from qdora.cli import main
sys.meta_path.insert(0, Finder())
sys.exit(main(["quantize", "a", "b"]))
"""
SEND = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "send",
    [
        SEND,
        f"try: {SEND}\n            except KeyboardInterrupt: pass",
        f"try: {SEND}\n            except KeyboardInterrupt: raise ImportError('a module twice') from None",
    ],
    ids=["passed on", "swallowed", "turned into another"],
)
def test_an_interrupt_while_torch_is_imported(send: str) -> None:
    program = INTERRUPTED.replace("SEND", send)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
