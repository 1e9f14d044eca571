"""Shapes as model cards publish them, for planning where the hub's configuration is not at hand: by hub name,
``model_type`` and the settings that differ from transformers' defaults.
"""

from __future__ import annotations


def _shape(
    model_type: str, width: int, inner: int, blocks: int, heads: tuple[int, int], vocabulary: int, **others: object
) -> dict[str, object]:
    """``heads``: of queries, and of keys and values; they divide the width unless ``head_dim`` says otherwise."""
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": False,
        **others,
    }


_TIED = {"tie_word_embeddings": True}
_LLAMA_3_8B = _shape("llama", 4096, 14336, 32, (32, 8), 128256)
_MISTRAL_7B = _shape("mistral", 4096, 14336, 32, (32, 8), 32000, sliding_window=None)
_GEMMA = _TIED | {"head_dim": 256}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}

PUBLISHED_SHAPES: dict[str, dict[str, object]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.2-1B-Instruct": _shape("llama", 2048, 8192, 16, (32, 8), 128256, **_TIED),
    "meta-llama/Llama-3.2-3B-Instruct": _shape("llama", 3072, 8192, 28, (24, 8), 128256, **_TIED),
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B | {"vocab_size": 32768},
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B | {"sliding_window": 4096},
    "Qwen/Qwen2.5-1.5B-Instruct": _shape("qwen2", 1536, 8960, 28, (12, 2), 151936, **_TIED),
    "Qwen/Qwen2.5-7B-Instruct": _shape("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "Qwen/Qwen3-1.7B": _shape("qwen3", 2048, 6144, 28, (16, 8), 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-4B": _shape("qwen3", 2560, 9728, 36, (32, 8), 151936, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _shape("qwen3", 4096, 12288, 36, (32, 8), 151936, head_dim=128),
    "google/gemma-2-2b-it": _shape("gemma2", 2304, 9216, 26, (8, 4), 256000, **_GEMMA),
    "google/gemma-2-9b-it": _shape("gemma2", 3584, 14336, 42, (16, 8), 256000, **_GEMMA),
    "google/gemma-3-1b-it": _shape("gemma3_text", 1152, 6912, 26, (4, 1), 262144, sliding_window=512, **_GEMMA),
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": _shape("gemma3_text", 2560, 10240, 34, (8, 4), 262208, sliding_window=1024, **_GEMMA),
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
    },
    "microsoft/Phi-3.5-mini-instruct": _shape("phi3", 3072, 8192, 32, (32, 32), 32064, pad_token_id=32000),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _shape("llama", 2048, 8192, 24, (32, 32), 49152, **_TIED),
}
