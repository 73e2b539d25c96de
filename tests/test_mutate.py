"""What `scripts/mutate.py` makes of a file before mutmut sees it: the same file, its decorators written out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutate import functions_of, line_of, lines_of, write_out_decorators

SOURCE = """\
def twice(f):
    return lambda *args: 2 * f(*args)


def more(n):
    return lambda f: lambda *args: n + f(*args)


@more(5)
@twice
def top(x):
    return x


class Some:
    @property
    def seven(self):
        return 7

    @staticmethod
    @twice
    def doubled(x):
        return x

    @classmethod
    def name(cls):
        return cls.__name__
"""


def test_written_out_it_does_the_same() -> None:
    written_out = write_out_decorators(SOURCE)
    for text in (SOURCE, written_out):
        names: dict = {}
        exec(text, names)
        some = names["Some"]()
        assert (names["top"](1), some.seven, some.doubled(4), some.name()) == (7, 7, 8, "Some")
    left = [ast.unparse(each) for function in functions_of(ast.parse(written_out)) for each in function.decorator_list]
    assert left == ["classmethod"]


@pytest.mark.parametrize("name", ["nf4.py", "dora.py", "adapterfile.py", "checkpoint.py", "verbs/merge.py"])
def test_no_function_of_the_library_is_out_of_reach(name: str) -> None:
    text = (Path(__file__).parents[1] / "qdora" / name).read_text()
    functions = functions_of(ast.parse(write_out_decorators(text)))
    assert len(functions) == len(functions_of(ast.parse(text)))
    assert {ast.unparse(each) for f in functions for each in f.decorator_list} <= {"staticmethod", "classmethod"}


def test_a_change_is_found_on_its_line() -> None:
    lines = (Path(__file__).parents[1] / "qdora" / "dora.py").read_text().splitlines()
    start = lines_of(Path("qdora/dora.py"))["xǁDoRALinearǁwatch"]
    assert lines[start - 1].strip().startswith("def watch")
    diff = "--- a\n+++ b\n@@ -1,3 +1,3 @@\n def watch(self):\n     text\n-    self._watched = tuple(shards)\n+    None"
    assert line_of(diff, start) == start + 2
