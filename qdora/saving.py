"""What `save_pretrained` means for a model of ours: its adapter, as with a `PeftModel`.

transformers' own would write the packed base under the names of our linears, beside a config that knows nothing of
NF4: files that load without an error, as a model whose linears are random. And it is called by others: by
`trainer.save_model()`, for each checkpoint, by `push_to_hub`.

So a class stands between the model and its own, under the same name, as torch's parametrizations and FSDP2 put one
there. (An attribute of the instance would hold the model in a cycle, which keeps its memory after `del`.)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from qdora.checkpoint import save_adapter
from qdora.errors import ConfigError

__all__ = ["save_as_adapter"]


def save_as_adapter(model: nn.Module) -> None:
    """Make `model.save_pretrained(directory)` write the model's adapter, in place."""
    if not isinstance(model, _SavesAdapter):
        own: Any = type(model)
        model.__class__ = _saving(own)


class _SavesAdapter:
    def save_pretrained(
        self: Any, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **unused: Any
    ) -> None:
        """Write the adapter, with exact magnitude offsets, for trainers save in order to go on.

        Args:
            save_directory: made if need be.
            is_main_process: False leaves the writing to another process.
            push_to_hub: refused; `model.push_to_hub(name)` does it.
            unused: what else transformers' own takes (shard sizes and the like), which says nothing about an adapter.

        Raises:
            ConfigError: there is no adapter: the base is where it was loaded from.
        """
        if push_to_hub:
            raise ConfigError("save_pretrained(push_to_hub=True) is not known here; use model.push_to_hub(name)")
        save_adapter(self, save_directory, exact_offsets=True, write=is_main_process)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """For pickle, which finds classes by their names, and there finds the model's own."""
        kinds = type(self).__mro__
        return _blank, (kinds[kinds.index(_SavesAdapter) + 1],), self.__dict__


@cache
def _saving(own: Any) -> Any:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (_SavesAdapter, own), names)


def _blank(own: Any) -> Any:
    kind = _saving(own)
    return kind.__new__(kind)
