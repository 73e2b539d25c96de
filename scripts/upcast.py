"""A peer's 4-bit model that computes in fp32 throughout: transformers and bitsandbytes leave parts of it in 16 bits."""

from __future__ import annotations

from typing import Any

import torch


def in_fp32(model: Any) -> Any:
    """In place: transformers keeps what is not 4-bit in 16 bits, and bitsandbytes rounds to its compute dtype."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model
