"""Formats of few bits as functions on weights: what a weight is once it went through the format and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from repbend_fast.assessment.k_quants import k_quant, kind_in_q4_k_m
from repbend_fast.errors import UserError
from repbend_fast.models.layers.rounded import Round
from repbend_fast.models.load import NF4_BLOCK

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""GGUF's formats that its Python package writes and reads."""
NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What ``llama-quantize`` takes where a width is no multiple of a k-quant's 256."""
FORMATS = ("nf4", *LEGACY, *NARROW, "q4_k_m")
USUAL = ("nf4", "q4_k_m", "q8_0")


def rounding_to(name: str, double_quantization: bool) -> Round:
    """The format of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        raise UserError(f"rounding: formats={name}; known: {', '.join(FORMATS)}")
    if name == "nf4":
        return lambda weight, place: nf4(weight, double_quantization)
    if name == "q4_k_m":
        return lambda weight, place: gguf(weight, kind_in_q4_k_m(place.layer, place.block, place.blocks))
    return lambda weight, place: gguf(weight, name)


def nf4(weight: Tensor, double_quantization: bool = True) -> Tensor:
    """As bitsandbytes' 4-bit layers hold it: blocks of 64 weights in the order in which they lie, whatever the width.

    ``double_quantization``: the blocks' scales are rounded to 8 bits too, as QLoRA does.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    flat = weight.reshape(-1)
    # Rows of one block: on the CPU bitsandbytes lets every row begin a block. Zeros at the end change no scale.
    rows = pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK).contiguous()
    packed, state = quantize_4bit(rows, blocksize=NF4_BLOCK, compress_statistics=double_quantization, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(-1)[: flat.numel()].view(weight.shape).to(weight.dtype)


def gguf(weight: Tensor, kind: str) -> Tensor | None:
    """As a GGUF file of that type holds it, or of the one in its place; None where the width is no multiple of 32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if kind in NARROW:
        found = k_quant(weight, kind)
        return gguf(weight, NARROW[kind]) if found is None else found
    quantization: Any = GGMLQuantizationType[kind.upper()]
    if weight.shape[-1] % GGML_QUANT_SIZES[quantization][0]:
        return None
    values = dequantize(quantize(weight.float().cpu().numpy(), quantization), quantization)
    return torch.from_numpy(values).to(weight.device, weight.dtype)
