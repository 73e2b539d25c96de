"""How a training run goes about its memory: what a plan may change, what it may not, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from qdora.shards import format_bytes
from qdora.simulate import Batch
from qdora.workspace import Workspace

__all__ = ["SWITCHES", "Need", "Plan", "Run"]

SWITCHES = ("hold_outputs", "activation_offloading", "embedding_on_host", "stream_base")
"""What a plan turns on or off, by the flags of `qdora train`."""
_GRANULE = 2**20


@dataclass(frozen=True)
class Plan:
    """How a step is run: what the planner may change."""

    rows: int
    """Of a micro-batch, per device."""
    accumulation: int
    """Micro-batches a step."""
    loss_chunk_bytes: int
    hold_outputs: bool = False
    activation_offloading: bool = False
    embedding_on_host: bool = False
    stream_base: bool = False

    def loss_chunk_size(self) -> str:
        """As its flag says it."""
        whole, rest = divmod(self.loss_chunk_bytes, _GRANULE)
        return str(self.loss_chunk_bytes) if rest else f"{whole}MiB"

    def flags(self) -> str:
        """As flags of `qdora train`."""
        flags = [
            f"--per_device_train_batch_size {self.rows}",
            f"--gradient_accumulation_steps {self.accumulation}",
            f"--loss_chunk_size {self.loss_chunk_size()}",
        ]
        return " ".join([*flags, *(f"--{name} true" for name in SWITCHES if getattr(self, name))])


@dataclass(frozen=True)
class Need:
    """What a plan takes."""

    parts: dict[str, int]
    """Bytes on the device at the peak, by what they are for."""
    moment: str
    """When in the step the peak comes."""
    host_parts: dict[str, int]
    """What waits in host memory, likewise."""

    @property
    def device_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host_parts.values())

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        rows = [f"  {name:<{width}}  {format_bytes(size):>8}" for name, size in self.parts.items()]
        total = f"  {'peak':<{width}}  {format_bytes(self.device_bytes):>8}   {self.moment}"
        host = f"  {'on the host':<{width}}  {format_bytes(self.host_bytes):>8}" if self.host_bytes else None
        return "\n".join([*rows, total, *([host] if host else [])])


@dataclass(frozen=True)
class Run:
    """What no plan changes."""

    length: int
    """Tokens of the longest row."""
    workspace: Workspace
    """Of the device."""
    one_place: bool = False
    """Whether the device is the CPU, on which nothing is spared by what waits on the host."""
    optim: str | None = None
    """Hugging Face's name of the optimizer; None is `CompensatedAdamW`."""
    checkpointing: bool = True
    filled: bool = False
    """Whether every row is `length` tokens, so that attention needs no mask."""
    flattened: bool = False
    """Whether the rows of a micro-batch are laid end to end, so that it needs one between them."""

    replicated: bool = False
    """Whether other processes train the same: DDP joins gradients in buckets, beside the gradients themselves."""
    lean_loss: bool = True
    """Whether the loss is the plain one, which is computed without all the logits."""

    def batch(self, rows: int) -> Batch:
        """A micro-batch of so many rows, as the model sees it."""
        if self.flattened:
            return Batch(1, rows * self.length, padded=False, packed=True)
        return Batch(rows, self.length, padded=rows > 1 and not self.filled)
