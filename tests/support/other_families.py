"""Tiny random models of families that break an assumption, or look as if they did."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 89
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = _COMMON | {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssConfig", _COMMON | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bamba": (
        "BambaConfig",
        _COMMON
        | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _MOE
        | {
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "num_experts": 4,
        }
        | {
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "nanochat": ("NanoChatConfig", _COMMON),
    "qwen2_moe": ("Qwen2MoeConfig", _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE | {"num_experts": 4, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4}),
    "llama4": ("Llama4TextConfig", _COMMON | {"head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        _MOE
        | {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "n_group": 1,
        }
        | {"n_routed_experts": 4, "first_k_dense_replace": 1, "topk_group": 1, "n_shared_experts": 1},
    ),
    "lfm2": ("Lfm2Config", _COMMON | {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("RecurrentGemmaConfig", _COMMON | {"lru_width": 64, "attention_window_size": 16}),
    "granite": ("GraniteConfig", _COMMON | {"logits_scaling": 1.0}),
    "cohere": ("CohereConfig", _COMMON),
    "minicpm3": (
        "MiniCPM3Config",
        _COMMON
        | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"qk_rope_head_dim": 16},
    ),
    "xlm": ("XLMConfig", {"vocab_size": VOCABULARY, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "causal": True}),
    "xlstm": (
        "xLSTMConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "pad_token_id": 0},
    ),
}


def other_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A frozen random causal LM in eval mode."""
    name, values = CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**(values | settings)), dtype=torch.float32
    )
    return model.to(dtype).requires_grad_(False).eval()
