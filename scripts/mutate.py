"""Would the tests notice if the code were wrong? mutmut changes one file in a thousand small ways and runs its tests.

    scripts/mutate.sh qdora/nf4.py             every mutant of the file, against its tests
    scripts/mutate.sh qdora/nf4.py --again     only those that lived, of the source as it was, after tests were added
    scripts/mutate.sh FILE --first             against the first of its test files alone, where it has several: most
                                               mutants die there and soon; --again shows the others all of the tests

It works in runs/mutation, on a copy of the tree. A mutant that no test kills is printed with its line, to be read: it
is a gap in the tests, or it changes nothing that could be seen.

mutmut leaves decorated functions alone, and the heart of this library is decorated (`once_differentiable`, `no_grad`,
`compiler.disable`). In the copy, `@d` above `def f` is therefore written out as what it stands for, `f = d(f)` below
it: mutmut sees a plain function, and each mutant is decorated as the original is. Statements outside functions stay as
they are: constants, dataclass fields.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tests that start processes of their own: seconds each, and those processes import the package that is not mutated.
DESELECTED = ["tests/test_dora.py::test_two_processes_train_as_one"]
# Where a file's tests are, if they are not in the file of its name alone.
TESTS = {
    "adapterfile": ["checkpoint", "whole"],
    "checkpoint": ["checkpoint", "whole", "kinship"],
    "dora": ["dora", "product"],
    "merge": ["merge", "whole", "kinship"],
    "nf4": ["nf4", "nf4format"],
    "nf4format": ["nf4format", "nf4"],
    "product": ["product", "dora"],
}
# What became of each mutant, over all runs on one copy of the source.
FOUND = "found.json"
# A test run that dies of a mutant has noticed it.
KILLED = ("killed", "segfault")
# The plugin `unraisableexception` collects garbage five times as pytest ends: a second for each mutant.
SETTINGS = """\
[mutmut]
source_paths = qdora
only_mutate = {source}
also_copy = scripts
process_isolation = forkserver
use_git_change_detection = false
timeout_constant = 30.0
timeout_multiplier = 4.0
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args =
    -p
    no:cacheprovider
    -p
    no:unraisableexception
{deselected}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="qdora/NAME.py or qdora/verbs/NAME.py")
    parser.add_argument("--again", action="store_true", help="only what lived the last time")
    parser.add_argument("--first", action="store_true", help="against the first of its test files alone")
    arguments = parser.parse_args()
    source: Path = arguments.source
    workshop = ROOT / "runs" / "mutation" / source.stem
    if not (ROOT / source).is_file():
        parser.error(f"{source} is no file; name one from the root of the repository, such as qdora/nf4.py")
    if arguments.again and not (workshop / FOUND).is_file():
        parser.error("nothing lived yet; run it without --again first")
    known: dict[str, str] = {}
    if arguments.again:
        known = json.loads((workshop / FOUND).read_text(encoding="utf-8"))
        shutil.copytree(ROOT / "tests", workshop / "tests", dirs_exist_ok=True)
        # which test reaches what: a test that was changed may reach more
        (workshop / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    else:
        furnish(workshop, source)
    tests = TESTS.get(source.stem, [source.stem])
    configure(workshop, source, tests[:1] if arguments.first else tests)
    lived = [name for name, status in known.items() if status not in KILLED]
    if lived or not arguments.again:
        with (workshop / "progress.txt").open("w") as file:
            progress = None if sys.stdout.isatty() else file
            run = mutmut("run", "--max-children", "1", *lived)
            subprocess.run(run, cwd=workshop, check=True, env=environment(), stdout=progress)
        # With other tests mutmut takes all that it knew for stale.
        now = statuses(workshop)
        known |= {name: now[name] for name in lived or now}
        (workshop / FOUND).write_text(json.dumps(known, indent=1), encoding="utf-8")
    report(workshop, source, known)


def furnish(workshop: Path, source: Path) -> None:
    """A tree for mutmut to work in, with the decorators of `source` written out."""
    shutil.rmtree(workshop, ignore_errors=True)
    for directory in ("qdora", "tests", "scripts"):
        shutil.copytree(ROOT / directory, workshop / directory, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy2(ROOT / "pyproject.toml", workshop)
    text = (ROOT / source).read_text(encoding="utf-8")
    (workshop / source).write_text(write_out_decorators(text), encoding="utf-8")


def configure(workshop: Path, source: Path, names: list[str]) -> None:
    """Tell mutmut what to change and which tests to run."""
    tests = [f"tests/test_{name}.py" for name in names]
    deselected = "".join(f"    --deselect\n    {name}\n" for name in DESELECTED if name.partition("::")[0] in tests)
    listed = "".join(f"\n    {path}" for path in tests)
    settings = SETTINGS.format(source=source, tests=listed, deselected=deselected)
    (workshop / "setup.cfg").write_text(settings, encoding="utf-8")


def write_out_decorators(text: str) -> str:
    """Replace `@d` above a function by `f = d(f)` below it, unless mutmut takes it as it is."""
    lines = text.splitlines()
    tree = ast.parse(text)
    # From the bottom up, so that the lines above keep their numbers.
    for function in sorted(functions_of(tree), key=lambda function: function.lineno, reverse=True):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        if not decorators or decorators in (["staticmethod"], ["classmethod"]):
            continue
        assert function.end_lineno is not None
        written_out = function.name
        for decorator in reversed(decorators):
            written_out = f"{decorator}({written_out})"
        lines.insert(function.end_lineno, f"{' ' * function.col_offset}{function.name} = {written_out}")
        for number in range(function.decorator_list[0].lineno, function.lineno):
            lines[number - 1] = ""
    return "\n".join(lines) + "\n"


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions and the methods, without those inside others."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]


def report(workshop: Path, source: Path, found: dict[str, str]) -> None:
    """Print the counts and, by line, what was not killed."""
    counts = Counter(found.values())
    print(f"\n{source}: {len(found)} mutants, {', '.join(f'{count} {status}' for status, count in counts.items())}")
    starts = {plain(name): line for name, line in lines_of(source).items()}
    for name, status in found.items():
        if status not in KILLED:
            diff = asked(workshop, "show", name)
            print(f"\n{source}:{line_of(diff, starts[plain(name)])} {name.rpartition('.')[2]}: {status}")
            print("\n".join(line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)))


def statuses(workshop: Path) -> dict[str, str]:
    """What became of each mutant, by its name."""
    pairs = (line.strip().rpartition(": ") for line in asked(workshop, "results", "--all", "true").splitlines())
    return {name: status for name, colon, status in pairs if colon}


def lines_of(source: Path) -> dict[str, int]:
    """The line of each function's `def`, by the name that mutmut gives it."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    owners = {id(function): owner.name for owner in classes for function in owner.body}
    return {
        f"xǁ{owners[id(function)]}ǁ{function.name}" if id(function) in owners else f"x_{function.name}": function.lineno
        for function in functions_of(tree)
    }


def plain(name: str) -> str:
    return name.rpartition(".")[2].partition("__mutmut_")[0]


def line_of(diff: str, start: int) -> int:
    """The line that the diff of a function changes, if the function's `def` is on the line `start`."""
    lines = diff.splitlines()
    hunk = next(number for number, line in enumerate(lines) if line.startswith("@@"))
    first = int(lines[hunk].partition("-")[2].partition(",")[0].partition(" ")[0])
    changed = next(number for number, line in enumerate(lines[hunk + 1 :]) if line.startswith("-"))
    return start + first - 1 + changed


def asked(workshop: Path, *arguments: str) -> str:
    done = subprocess.run(mutmut(*arguments), cwd=workshop, check=True, env=environment(), stdout=subprocess.PIPE)
    return done.stdout.decode()


def mutmut(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("mutmut")), *arguments]


def environment() -> dict[str, str]:
    """One thread, since workers are forked, and one order of tests."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


if __name__ == "__main__":
    main()
