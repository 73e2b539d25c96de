"""transformers' loading in 4 bits, with the experts left to us.

transformers packs linears, and nothing else: the experts of a mixture it would stack, a layer at a time, in 16 bits.
So its loader is told by a quantizer of our own, registered as transformers lets anybody register one, to load the model
without experts; and their weights are then read from the files one by one, as they lie there: an NF4 weight as it is,
a 16-bit one quantized at once. Memory never holds a stack, unless the files do.

On disk an expert's weight in NF4 is what bitsandbytes makes of any linear's, under the key that it has in 16 bits
(`….experts.3.up_proj.weight` beside `….experts.3.up_proj.weight.absmax` and so on): the format of transformers 4, whose
experts were linears. transformers 5 does not read it, and never wrongly: it stops while loading (5.23) or at the first
forward (5.17).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qdora.base import BaseWeight
from qdora.dense import DenseWeight
from qdora.errors import CheckpointError
from qdora.experts import STACKS, RoutedExperts, hollow_experts
from qdora.inject import left_alone, make_plain
from qdora.nf4 import NF4Weight
from qdora.nf4format import quantize_nf4, states_by_weight
from qdora.shards import ShardReader

__all__ = [
    "KeyNames",
    "NF4Config",
    "fill_experts",
    "key_names",
    "nf4_config",
    "take_off_marks",
]

_METHOD = "qdora_nf4"
_DECIDED = {"quant_method", "load_in_4bit", "load_in_8bit"}


@register_quantization_config(_METHOD)
class NF4Config(BitsAndBytesConfig):
    """transformers' description of NF4 under our method's name, which makes it load by `NF4Quantizer`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            **{name: value for name, value in settings.items() if name not in _DECIDED and not name.startswith("_")},
        )
        self.quant_method = _METHOD

    @classmethod
    def on_the_fly(cls, dtype: torch.dtype) -> NF4Config:
        """For a 16-bit model, quantized as it loads."""
        return cls(**nf4_config(dtype).to_dict())

    @classmethod
    def of_checkpoint(cls, found: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's `quantization_config`, so put that transformers asks for the method by its name."""
        return {**{name: value for name, value in found.items() if "load_in" not in name}, "quant_method": _METHOD}


@register_quantizer(_METHOD)
class NF4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer for a model whose experts are not there yet."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        hollow_experts(model)
        make_plain(model)
        stay = left_alone(model)
        if stay and not self.pre_quantized:
            self.quantization_config.llm_int8_skip_modules = [*get_keys_to_not_convert(model), *stay]
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _QuantizeFromBfloat16(self)


class _QuantizeFromBfloat16(Bnb4bitQuantize):
    """bitsandbytes' quantization, of what `_to_quantize` makes of a weight."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        weights = {
            name: _to_quantize(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()
        }
        converted: dict[str, Tensor] = super().convert(weights, *args, **kwargs)
        return converted


def _to_quantize(weight: Tensor) -> Tensor:
    """A weight as `qdora quantize` rounds it, which takes bf16: other arithmetic must not mean other NF4 weights."""
    return weight.bfloat16()


def nf4_config(
    dtype: torch.dtype, double_quant: bool = True, skip_modules: tuple[str, ...] | None = None
) -> BitsAndBytesConfig:
    """transformers' description of our NF4 format."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=None if skip_modules is None else list(skip_modules),
    )


def take_off_marks(model: Any) -> None:
    """transformers' of a model in 4 bits, which are not true of one with our linears, in place."""
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@dataclass(frozen=True)
class KeyNames:
    """What a module may be called by the keys of a checkpoint."""

    prefix: str
    """Of the base model (`model`, `transformer`), which some checkpoints leave out of their keys."""
    renamings: tuple[Any, ...]
    """transformers' own, for families whose modules were renamed since (Mixtral: `block_sparse_moe` to `mlp`)."""

    def candidates(self, path: str) -> Iterator[str]:
        """Paths in the model that a path in the file may mean, the likeliest first."""
        renamed = path
        for renaming in self.renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for name in dict.fromkeys((path, renamed)):
            yield from (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))


def key_names(model: Any) -> KeyNames:
    """Of a model's family, and of those that it is made of."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return KeyNames(model.base_model_prefix, tuple(entry for entry in mapping if isinstance(entry, WeightRenaming)))


def fill_experts(model: Any, reader: ShardReader, quantize: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Read the experts of a model that was loaded without them, in place.

    Args:
        quantize: make NF4 of what lies in 16 bits; otherwise it stays so.
        dtype: in which a 16-bit weight is taken.
        device: where the experts will be.

    Raises:
        CheckpointError: a weight is missing, damaged or of another shape.
    """
    hollow = {path: module for path, module in model.named_modules() if isinstance(module, RoutedExperts)}
    keys: dict[str, str] = {}
    if hollow:
        names = key_names(model)
        for key in reader:
            if ".experts." in key:
                keys |= dict.fromkeys(names.candidates(key.removesuffix(".weight")), key)
    states = states_by_weight(reader) if keys else {}
    for path, experts in hollow.items():
        stored = _StoredExperts(path, experts, keys, states, reader)
        experts.fill(partial(stored.weight, quantize=quantize, dtype=dtype, device=device))


class _StoredExperts:
    """The experts of one layer in the files: a tensor for each matrix, packed or not, or the stacks in 16 bits."""

    def __init__(
        self,
        path: str,
        experts: RoutedExperts,
        keys: Mapping[str, str],
        states: Mapping[str, list[str]],
        reader: ShardReader,
    ) -> None:
        self._path, self._experts, self._reader = path, experts, reader
        self._keys = {
            name: keys[name]
            for number in range(experts.num_experts)
            for name in (f"{path}.{number}.{linear}" for linear in experts.names)
            if name in keys
        }
        self._states = {key: states[key] for key in self._keys.values() if key in states}
        # All at once, for a file with a hundred thousand tensors takes long to open.
        parts = [part for key, found in self._states.items() for part in (key, *found)]
        self._packed = reader.get_all(parts)
        stacks = {name: keys[f"{path}.{name}"] for name in STACKS if f"{path}.{name}" in keys}
        self._stacks = {} if self._keys else {name: reader.get(key) for name, key in stacks.items()}
        for name, stack in self._stacks.items():
            found, expected = tuple(stack.shape), experts.stack_shapes()[name]
            if found != expected:
                raise CheckpointError(f"{path}.{name} is {found}, and {expected} by config.json")

    def weight(self, number: int, name: str, quantize: bool, dtype: torch.dtype, device: torch.device) -> BaseWeight:
        """See `fill_experts`."""
        path = f"{self._path}.{number}.{name}"
        key = self._keys.get(path)
        weight: NF4Weight | DenseWeight
        if key is not None and key in self._states:
            parts = {part[len(key) + 1 :]: self._packed[part] for part in (key, *self._states[key])}
            weight = NF4Weight.from_tensors(parts)
        else:
            matrix = self._matrix(path, key, number, name).to(dtype)
            if quantize:
                weight = NF4Weight.from_tensors(quantize_nf4(_to_quantize(matrix), device=device))
            else:
                weight = DenseWeight(matrix)
        found, expected = (weight.out_features, weight.in_features), self._experts.shapes()[name]
        if found != expected:
            raise CheckpointError(f"the weight of {path} is {found}, and {expected} by config.json")
        return weight.to(device)

    def _matrix(self, path: str, key: str | None, number: int, name: str) -> Tensor:
        if key is not None:
            return self._reader.get(key)
        if self._stacks.keys() != STACKS:
            raise CheckpointError(
                f"{self._reader.directory} does not hold the model of its config.json: the weight of {path} is "
                "missing; download or write it again"
            )
        return self._experts.cut(self._stacks["gate_up_proj"], self._stacks["down_proj"], number, name)
