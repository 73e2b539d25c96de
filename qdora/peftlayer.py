"""PEFT's 4-bit LoRA layer, computed by our engine: PEFT keeps what it owns, we do the arithmetic.

PEFT makes the layer, names and holds its parameters, saves, loads, merges and disables it, through its own code: the
class below is PEFT's `Linear4bit` but for `forward`. That hands PEFT's own parameters to a `DoRALinear` over the memory
of bitsandbytes' packed weight. The engine is no submodule, so PEFT's state dicts, counts and devices are what they
were.

Three things differ from `DoRALinear` as qdora trains it. The magnitude is m itself, PEFT's parameter, not an offset
from ‖W‖: keep it in fp32 (PEFT does). The dtype of the product is bitsandbytes' compute dtype. And its own forward is
never called, not even for a disabled adapter, for on some CPUs it repacks the weight in eval mode.

With dropout, PEFT thins out what the base weight sees as well; here it thins out the low-rank path alone (see `dora`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear4bit, LoraConfig
from torch import Tensor, nn

from qdora.dora import DoRALinear, FrozenLinear
from qdora.errors import ConfigError
from qdora.nf4 import NF4Weight
from qdora.nf4format import PackedLinear

__all__ = ["EngineLinear4bit", "PackedLinear"]


class EngineLinear4bit(Linear4bit):
    """PEFT's layer for a 4-bit linear with another forward. One adapter may be active at a time."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **unused: Any,
    ) -> None:
        """
        Args:
            base_layer: bitsandbytes' `Linear4bit`, of type nf4.
            unused: what PEFT tells layers of every kind, and its own 4-bit layer passes over too.
        """
        super().__init__(base_layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha)
        self._engines: dict[str, _Engine] = {}
        self._packed: tuple[int, NF4Weight] | None = None

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        """(..., in_features) → (..., out_features), in the dtype of the input.

        Raises:
            ConfigError: several adapters are active, or each row names its own.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if rest or named.get("adapter_names") is not None or len(active) > 1:
            raise ConfigError(
                "qdora's engine for PEFT computes one active adapter, found "
                f"{', '.join(active) if len(active) > 1 else 'one for each row'}; choose one by set_adapter, or leave "
                "use_in_peft out"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        linear = self.get_base_layer()
        if not active or self.disable_adapters or self.merged:
            layer: Any = FrozenLinear(self.packed_weight(), linear.bias)
        else:
            layer = self._engine(active[0])
            layer.follow(self, active[0])
        dtype = linear.compute_dtype
        return layer(x if dtype is None else x.to(dtype)).to(x.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, and the engine goes too."""
        super().delete_adapter(adapter_name)
        self._engines.pop(adapter_name, None)

    def packed_weight(self) -> NF4Weight:
        """The base weight as it is now, over bitsandbytes' memory.

        Raises:
            ConfigError: bitsandbytes has repacked it.
        """
        weight = self.get_base_layer().weight
        if self._packed is None or self._packed[0] != weight.data_ptr():
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise ConfigError(
                    "the base model ran in eval mode before it got its adapter, and bitsandbytes repacked its weights; "
                    "load it again and attach the adapter first"
                )
            self._packed = weight.data_ptr(), NF4Weight.from_packed_linear(self.get_base_layer())
        return self._packed[1]

    def _engine(self, name: str) -> _Engine:
        """Of this adapter, made anew where PEFT has put another tensor in a place."""
        engine = self._engines.get(name)
        if engine is None or not engine.is_of(self, name):
            engine = self._engines[name] = _Engine(self, name)
        return engine


class _Engine(DoRALinear):
    """The arithmetic of one adapter of a PEFT layer, over PEFT's parameters; `magnitude_offset` is PEFT's m."""

    def __init__(self, layer: EngineLinear4bit, name: str) -> None:
        base = layer.packed_weight()
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            # What is drawn in here is thrown away.
            super().__init__(
                base,
                layer.r[name],
                layer.scaling[name],
                use_dora=name in layer.lora_magnitude_vector,
            )
        self.lora_A, self.lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        if self.use_dora:
            self.magnitude_offset = layer.lora_magnitude_vector[name].weight
        self.bias = layer.get_base_layer().bias

    def is_of(self, layer: EngineLinear4bit, name: str) -> bool:
        """Whether it still computes with what the layer holds."""
        return (
            self.base is layer.packed_weight()
            and self.lora_A is layer.lora_A[name].weight
            and self.lora_B is layer.lora_B[name].weight
            and (not self.use_dora or self.magnitude_offset is layer.lora_magnitude_vector[name].weight)
            and self.bias is layer.get_base_layer().bias
            and self.scaling == layer.scaling[name]
        )

    def follow(self, layer: EngineLinear4bit, name: str) -> None:
        """Be in the layer's mode, with the dropout that it has now: libraries turn it off in the modules themselves."""
        dropout: Any = layer.lora_dropout[name]
        self.training, self.dropout.training = layer.training, dropout.training
        self.dropout.p = getattr(dropout, "p", 0.0)

    @torch.no_grad()
    def magnitude(self) -> Tensor:
        """m, (O,) fp32."""
        assert self.magnitude_offset is not None
        return self.magnitude_offset.float()
