"""qdora: fine-tune a large language model on one GPU, with 4-bit NF4 base weights and DoRA adapters.

import qdora

qdora.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "base-nf4")
model = qdora.load_model("base-nf4", adapter=qdora.AdapterConfig(rank=16, alpha=32))
...                                     # any torch loop, or a transformers or TRL trainer
qdora.save_adapter(model, "adapter")
qdora.merge("base-nf4", "adapter", "merged")

What is exported is imported when it is first asked for: torch and transformers take seconds to load, and `qdora --help`
should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdora.checkpoint import load_adapter, save_adapter
    from qdora.config import AdapterConfig
    from qdora.dora import DoRALinear
    from qdora.dropin import use_in_peft
    from qdora.errors import CheckpointError, ConfigError, DataError, NumericsError, OutputError, QDoRAError
    from qdora.inject import adapters_disabled
    from qdora.model import load_model
    from qdora.reference import reference_model
    from qdora.tokenizer import load_tokenizer
    from qdora.verbs.chat import chat
    from qdora.verbs.estimate import Estimate, estimate
    from qdora.verbs.evaluate import EvaluateReport, evaluate
    from qdora.verbs.init import InitReport, init
    from qdora.verbs.inspect import InspectReport, inspect
    from qdora.verbs.merge import MergeReport, merge
    from qdora.verbs.quantize import QuantizeReport, quantize
    from qdora.verbs.train import TrainReport, train

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DoRALinear",
    "Estimate",
    "EvaluateReport",
    "InitReport",
    "InspectReport",
    "MergeReport",
    "NumericsError",
    "OutputError",
    "QDoRAError",
    "QuantizeReport",
    "TrainReport",
    "adapters_disabled",
    "chat",
    "estimate",
    "evaluate",
    "init",
    "inspect",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "quantize",
    "reference_model",
    "save_adapter",
    "train",
    "use_in_peft",
]

_HOMES = {
    "checkpoint": ("load_adapter", "save_adapter"),
    "config": ("AdapterConfig",),
    "dora": ("DoRALinear",),
    "dropin": ("use_in_peft",),
    "errors": ("CheckpointError", "ConfigError", "DataError", "NumericsError", "OutputError", "QDoRAError"),
    "inject": ("adapters_disabled",),
    "model": ("load_model",),
    "reference": ("reference_model",),
    "tokenizer": ("load_tokenizer",),
    "verbs.chat": ("chat",),
    "verbs.estimate": ("Estimate", "estimate"),
    "verbs.evaluate": ("EvaluateReport", "evaluate"),
    "verbs.init": ("InitReport", "init"),
    "verbs.inspect": ("InspectReport", "inspect"),
    "verbs.merge": ("MergeReport", "merge"),
    "verbs.quantize": ("QuantizeReport", "quantize"),
    "verbs.train": ("TrainReport", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qdora' has no attribute {name!r}")
    value = getattr(import_module(f"qdora.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
