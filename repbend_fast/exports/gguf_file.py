"""A GGUF file for llama.cpp, Ollama and their kin: header, vocabulary and weights, one weight at a time.

Written for the families whose round trip is tested; llama.cpp rotates pairs of neighbours where transformers rotates
halves, so Llama's q and k rows are reordered, and adds no 1 to Gemma's norms, so they hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor

from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.exports.gguf_vocabulary import REMEDY, Vocabulary, gguf_vocabulary
from repbend_fast.exports.merged import Weights
from repbend_fast.models.causal import CausalLM, Shape
from repbend_fast.models.load import DTYPES, keep_attention_cap, resolve_device

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from repbend_fast.data.tokenizer import Tokenizer

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "gemma2": "gemma2"}
"""transformers' names, and GGUF's."""
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class GgufPlan:
    """All that the file says besides its weights."""

    name: str
    shape: Shape
    vocabulary: Vocabulary
    kind: str


def planned_gguf(name: str, shape: Shape, tokenizer: Tokenizer, rows: int, kind: str | None, dtype: str) -> GgufPlan:
    """What is going to be written.

    Args:
        rows: of the embedding.
        kind: one of ``TYPES``; by default that of ``dtype``.

    Raises:
        UserError: a family, a setting of it, a tokenizer or a type that cannot be written.
    """
    kind = _OF_DTYPE[dtype] if kind is None else kind.lower()
    if kind not in TYPES:
        raise UserError(f"--type={kind}: known: {', '.join(TYPES)}; others by llama-quantize from the f16 file")
    if shape.model_type not in FAMILIES:
        raise UserError(
            f"gguf: family {shape.model_type} is not among those written here ({', '.join(FAMILIES)}); {REMEDY}"
        )
    for refused in _unknown_to_gguf(shape):
        raise UserError(f"gguf: {refused}, which the file cannot say; {REMEDY}")
    return GgufPlan(name, shape, gguf_vocabulary(tokenizer, rows), kind)


def _unknown_to_gguf(shape: Shape) -> list[str]:
    found = []
    rope = _rope(shape)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        found.append(f"{shape.model_type} with rope_type={rope.get('rope_type', rope.get('type'))}")
    layers = getattr(shape, "layer_types", None) or ()
    if getattr(shape, "use_sliding_window", False) or (shape.model_type == "qwen2" and "sliding_attention" in layers):
        found.append(f"{shape.model_type} with use_sliding_window")
    if shape.model_type == "gemma2" and _number(shape, "query_pre_attn_scalar") != _head_width(shape):
        wide = _number(shape, "hidden_size") / shape.num_attention_heads
        if _number(shape, "query_pre_attn_scalar") != wide or shape.num_hidden_layers != _LARGEST_GEMMA:
            found.append("gemma2 with a query_pre_attn_scalar that is not its head_dim")
    if shape.model_type == "llama" and getattr(shape, "mlp_bias", False):
        found.append("llama with mlp_bias")
    return found


_LARGEST_GEMMA = 46
"""Blocks of Gemma-2 27B, which llama.cpp knows by this number and scales by width per head."""


def _rope(shape: Shape) -> dict[str, object]:
    found = getattr(shape, "rope_parameters", None) or getattr(shape, "rope_scaling", None) or {}
    return dict(found)


def _number(shape: Shape, name: str) -> float:
    return float(cast(float, getattr(shape, name)))


def _head_width(shape: Shape) -> int:
    found = getattr(shape, "head_dim", None)
    return int(found) if found else shape.hidden_size // shape.num_attention_heads


def write_gguf(path: Path, plan: GgufPlan, weights: Weights) -> None:
    """Write the file.

    Raises:
        UserError: a weight that has no name in GGUF.
        OSError: it cannot be written.
    """
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape

    family = FAMILIES[plan.shape.model_type]
    names = get_tensor_name_map(
        next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family), plan.shape.num_hidden_layers
    )
    tied = plan.shape.tie_word_embeddings
    order: list[tuple[str, str]] = []
    for name in weights.kept:
        if tied and name == "lm_head.weight":
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(f"gguf: {name} has no place in a file of family {family}; {REMEDY}")
        order.append((name, new))
    writer = GGUFWriter(path, family)
    _write_header(writer, plan)
    for name, new in order:
        kept = weights.kept[name]
        kind = GGMLQuantizationType[_kind(plan.kind, kept.shape)]
        shape = quant_shape_to_byte_shape(kept.shape, kind) if kind.name not in ("F32", "F16") else kept.shape
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(new, shape, np.dtype(dtype), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, new in order:
            writer.write_tensor_data(_encoded(_reordered(plan.shape, new, weights[name]), plan.kind))
    finally:
        writer.close()


def _kind(kind: str, shape: tuple[int, ...]) -> str:
    """Of one weight: vectors stay in float32, and so do widths that fill no whole block."""
    if len(shape) < 2:
        return "F32"
    return "F16" if kind.startswith("q") and shape[-1] % 32 else kind.upper()


def _encoded(weight: Tensor, kind: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    found = _kind(kind, tuple(weight.shape))
    values = weight.float().numpy()
    if found in ("F32", "F16"):
        return values.astype(np.float32 if found == "F32" else np.float16)
    return quantize(values, GGMLQuantizationType[found])


def _reordered(shape: Shape, name: str, weight: Tensor) -> Tensor:
    if shape.model_type == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = shape.num_attention_heads if ".attn_q." in name else int(_number(shape, "num_key_value_heads"))
        return (
            weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2)
            .reshape(weight.shape)
        )
    if shape.model_type == "gemma2" and name.endswith("norm.weight"):
        return weight.float() + 1
    return weight


def _write_header(writer: GGUFWriter, plan: GgufPlan) -> None:
    shape, vocabulary = plan.shape, plan.vocabulary
    writer.add_name(plan.name)
    writer.add_file_type(_FILE_TYPES[plan.kind])
    writer.add_quantization_version(2)
    for key, value in header_of(shape).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    adders: dict[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, token in vocabulary.special.items():
        adders[name](token)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def header_of(shape: Shape) -> dict[str, int | float]:
    """What the file says of the model's shape, by key. Whole numbers and floats are other types there."""
    family = FAMILIES[shape.model_type]
    rope = _rope(shape)
    theta = rope.get("rope_theta") or getattr(shape, "rope_theta", None) or 10000.0
    found: dict[str, int | float] = {
        "context_length": int(_number(shape, "max_position_embeddings")),
        "block_count": shape.num_hidden_layers,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": int(_number(shape, "intermediate_size")),
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": int(_number(shape, "num_key_value_heads")),
        "attention.layer_norm_rms_epsilon": _number(shape, "rms_norm_eps"),
        "attention.key_length": _head_width(shape),
        "attention.value_length": _head_width(shape),
        "rope.dimension_count": _head_width(shape),
        "rope.freq_base": float(cast(float, theta)),
        "vocab_size": shape.vocab_size,
    }
    if shape.model_type == "gemma2":
        found |= {
            "attention.sliding_window": int(_number(shape, "sliding_window")),
            "attn_logit_softcapping": _number(shape, "attn_logit_softcapping"),
            "final_logit_softcapping": _number(shape, "final_logit_softcapping"),
        }
    return {f"{family}.{key}": value for key, value in found.items()}


def load_gguf(path: Path, shape: Shape, settings: ModelConfig) -> CausalLM:
    """The file's weights through transformers' own loader, in a model of ``shape``: the loader reads neither soft-caps
    nor what scales Gemma's attention, and ``header_differences`` sees whether they are there.
    """
    from transformers import AutoModelForCausalLM

    device = resolve_device(settings.device)
    arguments: dict[str, object] = {"gguf_file": path.name, "config": shape, "dtype": DTYPES[settings.dtype]}
    model = cast(CausalLM, AutoModelForCausalLM.from_pretrained(str(path.parent), **arguments))
    keep_attention_cap(model, settings)
    return model.to(device)


def header_differences(path: Path, plan: GgufPlan) -> list[str]:
    """What a written file says otherwise than the model and its tokenizer do."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    expected: dict[str, object] = dict(header_of(plan.shape))
    vocabulary = plan.vocabulary
    expected |= {f"tokenizer.ggml.{_SPECIAL[name]}_token_id": token for name, token in vocabulary.special.items()}
    expected |= {"tokenizer.ggml.tokens": vocabulary.tokens, "tokenizer.ggml.model": vocabulary.model}
    expected |= {"tokenizer.ggml.add_bos_token": vocabulary.add_bos}
    if vocabulary.template:
        expected["tokenizer.chat_template"] = vocabulary.template
    lines = []
    for key, value in expected.items():
        found = fields[key].contents() if key in fields else None
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            shown = "other than the tokenizer's" if isinstance(value, list | str) else f"{found}, and should be {value}"
            lines.append(f"{path.name}: {key} is {shown}")
    return lines


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
