"""What operations make and do, counted as they run: bytes that are alive, or computations.

Both are dispatch modes of torch, which see every operation below autograd, those of the backward too, over real tensors
or fake ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["Diary", "Ledger"]

# Its last argument says which gradients are made. The fake one makes them all.
_MASKED = torch.ops.aten.native_batch_norm_backward.default


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor | None]) -> None:
        """Take these for no bytes."""
        self._known.update((tensor.untyped_storage()._cdata, 0) for tensor in tensors if tensor is not None)

    def restart(self) -> None:
        """Let the peak begin from here."""
        self.most = self.held

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = tuple(compress(result, args[-1])) if function is _MASKED else result
        for item in tree_iter(made):
            if isinstance(item, Tensor):
                self._enter(item.untyped_storage())
        return result

    def _enter(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size = storage.nbytes()
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.held -= self._known.pop(key)


class Diary(TorchDispatchMode):
    """Counts operations that compute something, rather than show a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.computations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a fake tensor asks for its device in operations of their own
        shows = function.is_view or function.namespace == "prim" or "view" in str(function)
        self.computations += not shows
        return function(*args, **(kwargs or {}))
