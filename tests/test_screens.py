"""`--help` fits a screen of 80 columns and 40 lines, whatever the verb."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qdora.arguments import flag_parser
from qdora.cli import _VERBS, main
from qdora.screens import VERBS, asked_for


@pytest.mark.parametrize("verb", [[], *([name] for name in VERBS)], ids=lambda verb: " ".join(verb) or "qdora")
def test_it_fits(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert lines[0].startswith(f"usage: qdora {verb[0] if verb else 'VERB'}")


def test_each_verb_is_listed_and_runs() -> None:
    assert VERBS.keys() == _VERBS.keys()


def test_the_flags_shown_exist() -> None:
    for verb in ("train", "estimate"):
        screen = asked_for([verb, "--help"])
        assert screen is not None
        known = {name for action in flag_parser(verb)._actions for name in action.option_strings} | {"--help_all"}
        shown = {word.strip(",`[]();") for word in screen.split() if word.startswith(("--", "`--"))}
        assert shown <= known, shown - known


def test_a_verb_alone_asks_for_help() -> None:
    assert asked_for(["train"]) == asked_for(["train", "-h"])
    assert asked_for(["train", "--max_steps", "3"]) is None
    assert asked_for(["quantise"]) is None


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from qdora.cli import main; main(['--help']); main(['train', '--help']); main(['quantise']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]
    assert done.stderr == "qdora: unknown verb 'quantise'; did you mean quantize?\n"


def test_help_all_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "estimate"):
        assert main([verb, "--help_all"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: qdora {verb}")
        for flag in ("--magnitude_learning_rate", "--adam_beta1", "--packing_strategy"):
            assert flag in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("evaluate", "learning_rate", "compare", "max_shard_size"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_of_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "cmd"]) == 2
    assert "there is bash, zsh, fish" in capsys.readouterr().err
