"""qdora: fine-tune a large language model on one GPU, with 4-bit NF4 base weights and DoRA adapters.

import qdora

qdora.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "base-nf4")
model = qdora.load_model("base-nf4", adapter=qdora.AdapterConfig(rank=16, alpha=32))
...                                     # any torch loop, or a transformers or TRL trainer
qdora.save_adapter(model, "adapter")
qdora.merge("base-nf4", "adapter", "merged")
"""

from qdora.checkpoint import load_adapter, save_adapter
from qdora.config import AdapterConfig
from qdora.dora import DoRALinear
from qdora.errors import CheckpointError, ConfigError, DataError, NumericsError, QDoRAError
from qdora.estimate import Estimate, estimate
from qdora.inject import adapters_disabled
from qdora.merge import MergeReport, merge
from qdora.model import load_model, load_tokenizer
from qdora.quantize import QuantizeReport, quantize
from qdora.train import TrainReport, train

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DoRALinear",
    "Estimate",
    "MergeReport",
    "NumericsError",
    "QDoRAError",
    "QuantizeReport",
    "TrainReport",
    "adapters_disabled",
    "estimate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "quantize",
    "save_adapter",
    "train",
]
