"""What the library promises to those who read it: exports, layers, the README's tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import qdora
from qdora import screens

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"__main__"},
    {"cli"},
    {"verbs"},
    {"assembly", "course", "notes"},
    {"corpus", "exhausted", "preflight", "trainer", "verify", "conversation", "residual"},
    {"answers", "planner", "baseweights", "drawing", "tokenizer"},
    {"arguments", "memory", "model", "analysis", "generation"},
    {"architecture", "saving"},
    {"callbacks", "checkpoint", "sources", "loader", "hub", "holding", "plan"},
    {"reference", "resume", "stream", "offload", "simulate", "sharding", "together"},
    {"adapterfile", "inject", "choices", "dropin", "card", "runrecord"},
    {"experts", "peftlayer"},
    {"gated"},
    {
        *{"data", "dora", "whole", "kinship", "measure", "movement", "numerics", "packing", "progress", "report"},
        *{"sampling", "scoring", "screens", "states"},
    },
    {"layouts", "kept"},
    {"toolcalls", "chats"},
    {
        "nf4",
        "ledger",
        "curves",
        "dense",
        "loss",
        "norm",
        "optimizer",
        "product",
        "rows",
        "shards",
        "output",
        "parsers",
        "tables",
        "templates",
    },
    {
        "base",
        "configfile",
        "flags",
        "groups",
        "listeners",
        "nearest",
        "nf4format",
        "origin",
        "signals",
        "trial",
        "workspace",
    },
    {"arithmetic", "bypassed", "config", "distributed", "lock"},
    {"patterns"},
    {"errors"},
]
MODULES = [path for path in (ROOT / "qdora").rglob("*.py") if path.stem != "__init__"]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qdora"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return "verbs" if path.parent.name == "verbs" else path.stem


def test_imports_point_down() -> None:
    layer_of = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert {room_of(path) for path in MODULES} == layer_of.keys()
    for path in MODULES:
        for other in imports_of(path) & layer_of.keys():
            assert layer_of[other] > layer_of[room_of(path)], f"{path.stem} imports {other}"


def test_only_nf4format_knows_bitsandbytes_and_nothing_pickles() -> None:
    for path in MODULES:
        text = path.read_text()
        if path.stem != "nf4format":
            assert not re.search(r"^\s*(import|from) bitsandbytes", text, re.MULTILINE), path.name
        assert not re.search(r"torch\.load\((?!.*weights_only=True)|pickle\.", text), path.name


def test_what_others_import_is_in_all() -> None:
    exported = {".".join(path.relative_to(ROOT).with_suffix("").parts): all_of(path) for path in MODULES}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in exported:
                unlisted = {alias.name for alias in node.names} - exported[node.module]
                assert not unlisted, f"{path.stem} imports {unlisted} from {node.module}"


def all_of(path: Path) -> set[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_all_is_exported() -> None:
    for name in qdora.__all__:
        assert hasattr(qdora, name), name
    assert {"estimate", "quantize", "train", "merge", "load_model", "save_adapter", "load_adapter"} <= set(
        qdora.__all__
    )
    assert list(qdora.__all__) == sorted(qdora.__all__)
    for verb in screens.VERBS.keys() - {"completion"}:
        assert callable(getattr(qdora, verb))


def test_the_readme_s_tree_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in [*MODULES, *(ROOT / "scripts").glob("*.*")]:
        assert re.search(rf"^\s+{re.escape(path.name)}\s+\S", readme, re.MULTILINE), f"{path.name} is not in the tree"


def test_tests_mirror_the_source() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    # What these do is tested where it is used: in `test_inject`, `test_dora`, `test_train`, `test_merge`,
    # `test_chat`, `test_report`, `test_exhausted`, `test_inspect` and `test_distributed`.
    elsewhere = {
        "__init__",
        "__main__",
        "errors",
        "adapterfile",
        "base",
        "dense",
        "curves",
        "conversation",
        "configfile",
        "corpus",
        "course",
        "flags",
        "generation",
        "notes",
        "runrecord",
        "tables",
        "tokenizer",
        "verify",
        "scoring",
        "sharding",
    }
    missing = {path.stem for path in MODULES} - tested - elsewhere
    assert not missing
