"""One line for code that trains with PEFT already: the same script, on our engine.

    config = qdora.use_in_peft(LoraConfig(use_dora=True, target_modules="all-linear"))
    model = get_peft_model(model_in_4_bits, config)     # or TRL's SFTTrainer(..., peft_config=config)

PEFT's own door for layers that it does not know, `LoraConfig._register_custom_module`, lets in one for a kind that it
does. Nothing of PEFT is changed, and nothing of the config is saved: an adapter that was trained this way is PEFT's.
"""

from __future__ import annotations

from typing import Any

from qdora.config import OTHER_FORWARDS
from qdora.errors import ConfigError

__all__ = ["use_in_peft"]


def use_in_peft(config: Any) -> Any:
    """Let PEFT build the layers of this config, on linears that bitsandbytes holds in NF4, with our forward.

    Args:
        config: a `peft.LoraConfig`, with or without DoRA.

    Returns:
        The same config.

    Raises:
        ConfigError: PEFT is not installed, this is another kind of config, or it asks for what the engine has not.
    """
    try:
        from peft import LoraConfig

        from qdora.peftlayer import EngineLinear4bit, PackedLinear
    except ImportError as error:
        raise ConfigError(f"use_in_peft needs PEFT: pip install 'qdora[peft]' ({error})") from None
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"use_in_peft takes a peft.LoraConfig, found {type(config).__name__}")
    unsupported = [name for name in OTHER_FORWARDS if getattr(config, name, None)]
    if unsupported:
        asked = ", ".join(unsupported)
        raise ConfigError(f"the config asks for {asked}, which qdora's engine has not; leave it to PEFT")
    config._register_custom_module({PackedLinear: EngineLinear4bit})
    return config
