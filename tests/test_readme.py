"""The README's commands, run as they are written, on tiny stand-ins under the names that the README uses."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qdora.arguments import parse_train
from qdora.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOTE = '{"messages": [{"role": "user", "content": "Taxi, 12 euros"}, {"role": "assistant", "content": "{}"}]}\n'


def blocks(language: str) -> list[str]:
    return [text for _, text in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", README, re.DOTALL | re.MULTILINE)]


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2.gguf"):
        shutil.copytree(tiny, tmp_path / name)
    shutil.copytree(ROOT / "tests" / "configs" / "Llama-3.1-8B", tmp_path / "meta-llama" / "Llama-3.1-8B")
    for name in ("notes", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text(NOTE * 40)
    return tmp_path


def test_the_commands(place: Path) -> None:
    """The recorded session, the other screens, and the commands to type."""
    (config,) = blocks("yaml")
    (place / "notes.yaml").write_text(config)
    parse_train([str(place / "notes.yaml")])
    shown = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    typed = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
    verbs = [shlex.split(line)[1:] for line in [*shown, *typed] if line.startswith("qdora ")]
    assert [verb[0] for verb in verbs] == [
        *["quantize", "init", "estimate", "train", "evaluate", "chat", "inspect", "merge", "estimate", "train"]
    ]
    for verb in verbs:
        assert main(verb) == 0, verb
    assert (place / "merged" / "config.json").is_file()
    assert (place / "notes-adapter" / "report.md").is_file()
    for line in typed:
        if line.startswith("scripts/"):
            script = ROOT / shlex.split(line)[0]
            assert os.access(script, os.X_OK), script


def test_the_python(place: Path) -> None:
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert (place / "merged-too" / "config.json").is_file()


def test_the_scripted_pipeline(place: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ROOT / "scripts" / "quantize_then_train.sh"
    command = [script, "HuggingFaceTB/SmolLM2-135M-Instruct", "notes.jsonl", "out", "--max_steps", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (place / "out").iterdir()} == {"base-nf4", "adapter", "merged"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == "merged model in out/merged\n"
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2
