"""Linears that stay as they are: in 16 bits, without adapters.

Some a model does not only call: it takes their weight and computes with that itself.

Mamba's mixers hand `out_proj.weight` to a fused kernel and multiply with `dt_proj.weight`; the indexers of sparse
attention look at their gate's dtype; Gemma 3n clamps two of its weights. An adapter on such a linear would be passed by
without a word, and a packed weight be read as what it is not.

Which they are is read in the source of the model's own classes: what a forward does on a GPU, with kernels that are not
here, cannot be found by running it. One reading does not count: slices of a weight to compute as tensor parallelism did
in pretraining (`pretraining_tp`), which only a setting that nobody fine-tunes with turns on. And what a class reads
further down than in its own children is not seen so, and stands in a table: RWKV rescales two linears of each block.

Others share their weight: Zamba has one block in several places, which its files hold once. An adapter in each place
would be another function in each, for which merged files have no room.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

__all__ = ["bypassed_paths", "shared_paths"]

# By the name of a class, the ends of the paths below it.
_READ_FROM_ABOVE = {"RwkvModel": (".attention.output", ".feed_forward.value")}


def bypassed_paths(model: nn.Module) -> list[str]:
    """Paths of linears, of whatever class, whose weight is read by a module that they are in."""
    found = []
    for path, module in model.named_modules():
        kind: Any = type(module)
        linears = [name for name, child in module.named_children() if hasattr(child, "in_features")]
        read = [name for name in linears if name in _read_by(kind)]
        if ends := _READ_FROM_ABOVE.get(kind.__name__):
            read += [name for name, _ in module.named_modules() if name.endswith(ends)]
        found += [f"{path}.{name}".lstrip(".") for name in read]
    return found


def shared_paths(model: Any) -> list[str]:
    """Paths of linears whose weight is another one's too. The head, which may be the embedding, is none of them."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    paths = {name.removesuffix(".weight") for name in (*tied, *tied.values()) if name.endswith(".weight")}
    head = model.get_output_embeddings() if paths else None
    named = ((path, module) for path, module in model.named_modules() if path in paths)
    return [path for path, module in named if hasattr(module, "in_features") and module is not head]


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight the code of this class reads; its parents' code too."""
    found: set[str] = set()
    for part in kind.__mro__:
        if part.__module__.startswith("torch."):
            break
        try:
            source = inspect.getsource(part)
        except (OSError, TypeError):
            continue  # made while the program runs
        if "pretraining_tp" not in source:
            found.update(re.findall(r"\bself\.(\w+)\.weight\b", source))
    return frozenset(found)
