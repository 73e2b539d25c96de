"""The base's weights out of its files, one at a time, as the adapter met them in training.

Without building the model, so that memory is bounded by the largest tensor: `merge` and `inspect` read a base this way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qdora.adapterfile import AdapterFile
from qdora.architecture import is_nf4_checkpoint, model_linears
from qdora.dense import DenseWeight
from qdora.errors import CheckpointError
from qdora.kinship import Kinship, ancestry_of, answers_of, kinship
from qdora.nf4 import NF4Weight
from qdora.nf4format import is_nf4_key, quantize_nf4, states_by_weight
from qdora.shards import ShardReader

__all__ = ["StoredBase"]


class StoredBase:
    """A base model's directory, read a weight at a time.

    Args:
        directory: an NF4 checkpoint or a 16-bit model.
        through_nf4: round the linears of a 16-bit model through NF4, as training does when it loads one in 4 bits.

    Raises:
        CheckpointError: no model, damaged, or quantized in another way.
    """

    def __init__(self, directory: Path, through_nf4: bool = False, trust_remote_code: bool = False) -> None:
        self.is_nf4 = is_nf4_checkpoint(directory, trust_remote_code)
        self.through_nf4 = through_nf4 and not self.is_nf4
        self.reader = ShardReader(directory)
        self.linears = model_linears(directory, (), trust_remote_code)
        self._states = states_by_weight(self.reader)
        for weight, (first, *_) in self._states.items():
            if weight not in self.reader:
                raise CheckpointError(f"{directory} holds {first!r} and no {weight!r}; download or write it again")
        found = {self.linears.find(key) for key in self.reader}
        stacked = [path for path in self.linears.shapes if ".experts." in path and path not in found]
        if self.through_nf4 and stacked:
            raise CheckpointError(
                f"{directory} holds experts as stacks, without a weight for {stacked[0]}; quantize it, and name the "
                "NF4 checkpoint"
            )

    @property
    def kind(self) -> str:
        """`nf4`, `16-bit rounded through nf4` or `16-bit`: what `weight` returns."""
        return "nf4" if self.is_nf4 else "16-bit rounded through nf4" if self.through_nf4 else "16-bit"

    def keys(self) -> list[str]:
        """Of all tensors, without those that describe how another one is packed."""
        return [key for key in self.reader if not is_nf4_key(key)]

    def adapted_keys(self, file: AdapterFile) -> dict[str, str]:
        """Path → key of the weight, for each linear that the adapter adapts, in the model's order.

        Raises:
            CheckpointError: the adapter is for another model.
        """
        keys = {path: key for key in self.reader if (path := self.linears.find(key)) is not None}
        for path, adapter in file.linears.items():
            if path not in keys:
                raise CheckpointError(
                    f"the adapter is for another model: it adapts {path!r}, which is not a linear of this base"
                    + (f"; it was made for {file.base_model!r}" if file.base_model else "")
                )
            out_features, in_features = self.linears.shapes[path]
            adapter.check_shape(path, out_features, in_features, file.base_model)
        self._check_whole(file)
        return {path: keys[path] for path in self.linears.shapes if path in file.linears}

    def kinship(self, file: AdapterFile) -> Kinship:
        """Whether the adapter was trained on these weights.

        Raises:
            CheckpointError: it cannot have been, by its shapes.
        """
        keys = self.adapted_keys(file)
        return kinship(
            file.ancestry,
            ancestry_of(self.reader.directory, self.reader),
            lambda path: answers_of(self.weight(keys[path])) if path in keys else None,
            file.own_hash,
        )

    def _check_whole(self, file: AdapterFile) -> None:
        for name, weight in file.whole.items():
            # Where head and embedding are one weight, it is stored under one of the two names, mostly the embedding's.
            names = self.linears.ends if self.linears.ends and name in self.linears.ends else (name,)
            key = self.key_of(*names)
            shape = None if key is None else tuple(self.plain(key).shape)
            if shape != tuple(weight.shape):
                raise CheckpointError(
                    f"the adapter is for another model: {name} is {shape or 'not'} here and {tuple(weight.shape)} in "
                    "the adapter"
                )

    def key_of(self, *names: str) -> str | None:
        """The first key under which the model's weight of one of these names is stored; None if it is not."""
        return next((key for key in self.keys() if self.linears.named(key, names) is not None), None)

    def weight(self, key: str) -> NF4Weight | DenseWeight:
        """The weight of a linear, (out_features, in_features) whichever way it is stored."""
        path, tensor = self.linears.find(key), self.reader.get(key)
        assert path is not None
        if key in self._states:
            return self._unpacked(key, tensor)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{key} holds whole numbers ({tensor.dtype}), and its model is not quantized")
        matrix = tensor.t().contiguous() if self.linears.transposed[path] else tensor
        if self.through_nf4 and self.linears.quantizes(path):
            return NF4Weight.from_tensors(quantize_nf4(matrix.bfloat16()))
        return DenseWeight(matrix)

    def plain(self, key: str) -> Tensor:
        """Any other tensor, as it is stored; a head that another tool packed comes unpacked, in fp32."""
        tensor = self.reader.get(key)
        return self._unpacked(key, tensor).dequantize(torch.float32) if key in self._states else tensor

    def _unpacked(self, key: str, packed: Tensor) -> NF4Weight:
        states = {part[len(key) + 1 :]: tensor for part, tensor in self.reader.get_all(self._states[key]).items()}
        return NF4Weight.from_tensors({"": packed, **states})
