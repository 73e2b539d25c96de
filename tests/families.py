"""Tiny random models of many families, in the layout in which their checkpoints lie on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import make_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
DENSE: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},  # biases on q, k and v
    "qwen3": {"head_dim": 32},  # norms on q and k
    "gemma2": {"head_dim": 32, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"head_dim": 32, "sliding_window": 32},
    "phi": {},  # biases everywhere, the head's too
    "phi3": {},  # q, k and v in one linear, gate and up in another
    "falcon": {"num_kv_heads": 4},  # linears of a class of its own; adds the residual in place
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # Conv1D: (in, out)
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
HYBRIDS: dict[str, dict[str, Any]] = {  # whose mixers read a linear's weight themselves
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 128,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "zamba2": {  # one block in three places, which the files hold once
        "mamba_d_state": 8,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
}
_ROUTED: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # w1, w3 and w2 under block_sparse_moe
    "qwen2_moe": {**_ROUTED, "shared_expert_intermediate_size": 64},  # and an expert for every token, gated
    "qwen3_moe": {**_ROUTED, "head_dim": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {  # low-rank attention, a dense layer first, shared experts
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
    },
}
FAMILIES = DENSE | HYBRIDS | MIXTURES
RENAMED: dict[str, dict[str, Any]] = {"gpt_neox": {}}  # whose head, in the files, is called embed_out
SEEING: dict[str, dict[str, Any]] = {  # whose files call the text model's modules otherwise
    "gemma3": {
        "text_config": {**_COMMON, "head_dim": 16, "sliding_window": 32},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    }
}


def make_family(name: str, directory: Path, **changes: Any) -> Path:
    """Write a model of this family (its `model_type`) with its tokenizer."""
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    common = {} if name == "gpt2" else _COMMON
    settings = {**common, "vocab_size": len(tokenizer), **ids, **(FAMILIES | SEEING | RENAMED)[name], **changes}
    if "text_config" in settings:
        settings = {**settings, "text_config": {**settings["text_config"], "vocab_size": len(tokenizer), **ids}}
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _draw(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Biases and norms begin as zeros and ones, with which a mistake would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
