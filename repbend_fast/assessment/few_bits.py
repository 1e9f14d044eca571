"""Formats of few bits as functions on weights: what a weight is once it went through the format and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repbend_fast.assessment.k_quants import k_quant, kind_in_q4_k_m
from repbend_fast.errors import UserError
from repbend_fast.models.layers.rounded import Round, nf4

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
