"""A tiny random model of every causal LM that transformers registers: its configuration's own defaults with the sizes
made small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from other_families import CONFIGS
from tiny_models import ragged_batch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from repbend_fast.config.schema import Config, LoraConfig
from repbend_fast.errors import UserError, one_line
from repbend_fast.models import attach_lora, find_decoder
from repbend_fast.models.coverage import WIDE
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.step import checked_runner
from repbend_fast.step.levers import levers_of
from repbend_fast.step.zero_start import check_zero, probe_of

VOCABULARY = 96
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_BY_NAME: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "dim_model", "word_embed_proj_dim", "embedding_size", "emb_dim"), 64
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "dim_ff",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "dense_ffn_hidden_size",
        ),
        128,
    ),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "expert_ffn_hidden_size"), 128),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "moe_ffn_hidden_size"),
        64,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "num_layers",
            "n_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 16
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("type_vocab_size",), 2),
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of a type that has each of its kinds of block."""
    kind, own = CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {})
    if model_type in TEXT_OF:  # whose own defaults are none
        text = _small(CONFIG_MAPPING[TEXT_OF[model_type]], OVERRIDES.get(TEXT_OF[model_type], {}) | own)
        if model_type.endswith("assistant"):
            text.num_kv_shared_layers = text.num_hidden_layers
        parts = {"vision_config": {"adapter_out_dim": 64}, "audio_config": {"adapter_out_dim": 64}}
        config = kind(text_config=text, **(parts if model_type == "dots3_note" else {}))
    else:
        config = _small(kind, own)
    text = config.get_text_config(decoder=True)
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        setattr(text, name, token)
    return config


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_QWEN4 = (
    _LINEAR
    | {"head_dim": 16, "num_key_value_heads": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 2}
    | {"ple_embed_dim": 16, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 32, "indexer_compress_ratio": 4}
)
_DRAFT = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_DOTS3 = {"n_group": 1, "n_routed_experts": 4, "num_key_value_heads": 4}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_HEADED = {"head_dim": 16, "num_key_value_heads": 2}
TEXT_OF = {
    "dots3_note": "dots3_note_text",
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
}
OVERRIDES: dict[str, dict[str, Any]] = {name: values for name, (_, values) in CONFIGS.items()} | {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_hidden_layers": 2, "layer_group_size": 2}
    | {"num_experts_per_tok": 2},
    "blt": {
        part: {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "head_dim": 16,
            "vocab_size": VOCABULARY,
        }
        for part in ("patcher_config", "encoder_config", "decoder_config", "global_config")
    }
    | {"encoder_hash_byte_group_vocab": 64, "num_key_value_heads": 4},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        },
    },
    "ctrl": {"dff": 128},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5},
    "gemma3n_text": _SHARED | {"hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4": {"text_config": _SHARED | {"hidden_size_per_layer_input": 16}},
    "gemma4_text": _SHARED | {"hidden_size_per_layer_input": 16},
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "git": {"vision_config": {"num_hidden_layers": 1}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": _HEADED,
    "hunyuan_v1_moe": _HEADED | {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "ministral": _HEADED,
    "nemotron": _HEADED,
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "num_experts_per_tok": 2},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local"] * 2,
    }
    | {"feed_forward_size": 128, "attention_head_size": 16},
    "xmod": {"default_language": "en_XX"},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "deepseek_v2": CONFIGS["deepseek_v2"][1] | {"num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
    | {"mamba_d_state": 16, "mamba_headdim": 16, "chunk_size": 16, "n_mamba_heads": 8, "adapter_rank": 4},
    "zamba": {"layer_types": ["linear_attention", "linear_attention", "hybrid"] * 2, "num_hidden_layers": 6},
}


def _small(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    values: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in _BY_NAME and isinstance(value, int) and not isinstance(value, bool):
            values[name] = min(_BY_NAME[name], value) if value > 0 else value
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
    if "kv_lora_rank" in default.to_dict():
        values["num_key_value_heads"] = 4
    types = getattr(default, "layer_types", None)
    name = kind.attribute_map.get("layer_types", "layer_types")
    if isinstance(types, list) and types and name not in own and not isinstance(getattr(kind, name, None), property):
        kinds = list(dict.fromkeys(types))
        kinds = kinds if len(kinds) > 1 else kinds * 2
        values |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    values = {name: value for name, value in values.items() if name not in own}
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    values |= {name: _small(type(part), own.get(name, {})) for name, part in parts.items()}
    return kind(**values, **{name: value for name, value in own.items() if name not in parts})


def tiny_of(model_type: str) -> Any:
    """A frozen random causal LM in eval mode, in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Verdict:
    """What became of one type.

    ``layout``: ``packed``, ``padded``, or "" where it is refused. ``why``: why it is refused or padded. ``head``: why
    no term may read its logits. ``attention``: the one that it needs. ``left_out``: matrices of its blocks that LoRA
    does not adapt. ``idle``: adapted ones that no gradient reaches.
    """

    model_type: str
    layout: str
    why: str = ""
    head: str = ""
    attention: str = ""
    left_out: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def verdict(model_type: str) -> Verdict:
    """Check the tiny model as a run does, and train one step on it: the first distances are exactly 0, and the
    gradients are finite.

    Raises:
        AssertionError: it is accepted, and the step is wrong.
    """
    try:
        tiny_of(model_type)
    except (ImportError, AttributeError, ValueError) as error:
        return Verdict(model_type, "", f"transformers does not build it here ({one_line(error)})")
    found = _decided(model_type, "", uses_head=True)
    if not found.layout and "let nothing read logits" in found.why:
        without = _decided(model_type, "", uses_head=False)
        found = replace(without, head=found.why) if without.layout else without
    if not found.layout and "try model.attention=eager" in found.why:
        eager = _decided(model_type, "eager", uses_head=True)
        found = replace(eager, why=found.why) if eager.layout else found
    return found


def _decided(model_type: str, attention: str, uses_head: bool) -> Verdict:
    try:
        return _bent(model_type, attention, uses_head)
    except UserError as error:
        why = str(error)
    why = re.sub(r"^model type \S+( cannot be bent)?:? ?", "", why)
    return Verdict(model_type, "", re.sub(r" \((relative error|other tokens) [^()]*\)|, and is [-+.e0-9]+", "", why))


def _bent(model_type: str, attention: str, uses_head: bool) -> Verdict:
    base = tiny_of(model_type)
    if attention:
        base.set_attn_implementation(attention)
    decoder = find_decoder(base)
    last = decoder.num_blocks
    adapted = attach_lora(base, LoraConfig(r=2, dropout=0.0), (last,))
    config = Config(model={"name": model_type, "dtype": "float32"}, data={"sources": [{"path": "demo"}]})
    runner = checked_runner(adapted, config, levers_of(config.memory, adapted), uses_head)
    settings = RepBendConfig(window_start=1, window_size=last, kl=0.3 if uses_head else 0.0)
    streams = build_objective(settings, last).streams(ragged_batch(), 0)
    for stream in streams:
        check_zero(stream, runner.backward(stream, dropout_seed=0))
        if probe := probe_of(stream, last):
            check_zero(probe, runner.measure(probe))
    generator = torch.Generator().manual_seed(11)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.grad = None
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for stream in streams:
        runner.backward(stream, dropout_seed=0)
    reached: dict[str, bool] = {}
    for name, parameter in trained.items():
        grad = parameter.grad
        assert grad is None or bool(torch.isfinite(grad).all()), f"{model_type}: the gradient of {name} is not finite"
        inside = name.split(f".{decoder.list_name}.")[1].split(".", 1)[1].split(".lora_")[0]
        inside = re.sub(r"\.\d+(?=\.|$)", ".*", inside)
        reached[inside] = reached.get(inside, False) or (grad is not None and bool(grad.any()))
    assert any(reached.values()), f"{model_type}: no gradient"
    assert runner.proof is not None
    leak = next((check.remark for check in runner.proof.checks if check.remark and not check.holds), "")
    kinds = runner.proof.coverage
    return Verdict(
        model_type,
        "packed" if runner.proof.packing == "on" else "padded",
        re.sub(r" \(relative error [^()]*\)", "", leak),
        attention=attention,
        left_out=tuple(sorted({name for kind in kinds for name, n in kind.left_out.items() if n >= WIDE})),
        idle=tuple(sorted(name for name, was in reached.items() if not was)),
    )
