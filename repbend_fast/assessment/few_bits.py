"""Formats of few bits as functions on weights: what a weight is once it went through the format and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from repbend_fast.errors import UserError
from repbend_fast.models.layers.rounded import Round
from repbend_fast.models.load import NF4_BLOCK

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""Those that the package gguf can write. Its k-quants, Q4_K_M among them, it can only read."""
USUAL = ("nf4", "q4_0", "q8_0")


def rounding_to(name: str, double_quantization: bool) -> Round:
    """The format of that name.

    Raises:
        UserError: no format of that name, or one that can only be read.
    """
    if name not in ("nf4", *GGUF):
        hint = (
            "; of k-quants gguf's Python package only reads the files"
            if name.startswith(("q4_k", "q5_k", "q6_k"))
            else ""
        )
        raise UserError(f"rounding: formats={name}; known: {', '.join(('nf4', *GGUF))}{hint}")
    return partial(nf4, double_quantization=double_quantization) if name == "nf4" else partial(gguf, kind=name)


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
    """As a GGUF file of that type holds it; None where the width is no multiple of its block, as 32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    quantization: Any = GGMLQuantizationType[kind.upper()]
    if weight.shape[-1] % GGML_QUANT_SIZES[quantization][0]:
        return None
    values = dequantize(quantize(weight.float().cpu().numpy(), quantization), quantization)
    return torch.from_numpy(values).to(weight.device, weight.dtype)
