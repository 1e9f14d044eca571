"""GGUF's k-quants, which gguf's Python package reads and does not write: Q4_K, Q5_K and Q6_K, and the mixture Q4_K_M.

    Q4_K, Q5_K   blocks of 32 weights in groups of 256:  x ≈ (d s) q − (d' m)    q of 4 or 5 bits, s and m of 6, d and
                 d' a float16 for the group
    Q6_K         blocks of 16 weights in groups of 256:  x ≈ (d s) (q − 32)      q of 6 bits, s of 8 with a sign

The formats are exact. Which scale a block gets is the encoder's choice, and this one's is its own: the best of a few in
the sense of least squares. So weights are near those of other encoders, and not equal to them.

Legend: G groups of 256, B blocks of a group, W weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 256
CHUNK = 1 << 22
"""Weights that are encoded at once: the search holds several float32 copies of them."""
SPANS = (0.9, 0.95, 1.0, 1.05)
"""How much of a block's span its levels cover in the scales that are tried: fewer leave the largest weights short."""


@dataclass(frozen=True)
class Blocks:
    """A weight in a k-quant: float32 ``d``, ``d_min`` [G, 1] that float16 holds; whole numbers ``scales``, ``mins``
    [G, B] and ``levels`` [G, B, W]. Q6_K has neither ``d_min`` nor ``mins``, and its levels begin at −32.
    """

    d: Tensor
    scales: Tensor
    levels: Tensor
    d_min: Tensor | None = None
    mins: Tensor | None = None

    def values(self, shape: torch.Size) -> Tensor:
        """The weights that the numbers stand for, float32."""
        found = (self.d * self.scales)[..., None] * self.levels
        if self.d_min is not None and self.mins is not None:
            found = found - (self.d_min * self.mins)[..., None]
        return found.reshape(shape)


def with_minimum(weight: Tensor, bits: int) -> Blocks:
    """Q4_K or Q5_K of a weight whose width is a multiple of 256."""
    x = weight.detach().float().reshape(-1, GROUP // 32, 32)
    top = 2**bits - 1
    scale, low = _fitted(x, top)
    d, d_min = (_sixteen(part.amax(-1, keepdim=True) / 63) for part in (scale, low))
    scales, mins = _whole(scale, d, 0, 63), _whole(low, d_min, 0, 63)
    levels = _whole(x + (d_min * mins)[..., None], (d * scales)[..., None], 0, top)
    return Blocks(d, scales, levels, d_min, mins)


def _fitted(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [G, B], neither below 0, of x ≈ scale · q − offset with q in 0 … top."""
    low = (-x.amin(-1)).clamp(min=0)
    span = (x.amax(-1) + low).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    chosen = span / top, low
    for share in SPANS:
        q = _whole(x + low[..., None], (share * span / top)[..., None], 0, top)
        mean_q, mean_x = q.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        spread = ((q - mean_q) ** 2).sum(-1)
        slope = ((q - mean_q) * (x - mean_x)).sum(-1) / spread.clamp(min=1e-30)
        slope = torch.where(spread > 0, slope, share * span / top).clamp(min=0)
        offset = (slope * mean_q[..., 0] - mean_x[..., 0]).clamp(min=0)
        error = ((slope[..., None] * q - offset[..., None] - x) ** 2).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, slope, chosen[0]), torch.where(better, offset, chosen[1])
    return chosen


def symmetric(weight: Tensor) -> Blocks:
    """Q6_K of a weight whose width is a multiple of 256."""
    x = weight.detach().float().reshape(-1, GROUP // 16, 16)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    best = torch.full_like(largest, torch.inf)
    scale = largest / -32
    for share in SPANS:
        q = _whole(x, (share * largest / -32)[..., None], -32, 31)
        fitted = (q * x).sum(-1) / (q * q).sum(-1).clamp(min=1e-30)
        error = ((fitted[..., None] * q - x) ** 2).sum(-1)
        scale, best = torch.where(error < best, fitted, scale), torch.minimum(error, best)
    widest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    d = _sixteen(widest / -128)
    scales = _whole(scale, d, -128, 127)
    return Blocks(d, scales, _whole(x, (d * scales)[..., None], -32, 31))


def _whole(x: Tensor, unit: Tensor, lowest: int, highest: int) -> Tensor:
    """x in whole units, 0 where the unit is 0."""
    return torch.where(unit == 0, 0.0, x / torch.where(unit == 0, 1.0, unit)).round().clamp(lowest, highest)


def _sixteen(x: Tensor) -> Tensor:
    return x.half().float()


def kind_in_q4_k_m(layer: str, block: int, blocks: int) -> str:
    """The type that ``llama-quantize`` gives a layer's weight in Q4_K_M: more bits for the values and the way out of
    the MLP in the first and the last eighth of the blocks, and in every third between.
    """
    last = layer.rsplit(".", 1)[-1]
    if last == "qkv_proj":
        return "q5_k"
    more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    return "q6_k" if last in ("v_proj", "down_proj") and more else "q4_k"


def k_quant(weight: Tensor, kind: str) -> Tensor | None:
    """As a GGUF file of type ``q4_k``, ``q5_k`` or ``q6_k`` holds it; None where the width is no multiple of 256."""
    if weight.shape[-1] % GROUP:
        return None
    found = torch.empty_like(weight)
    for rows, kept in zip(weight.split(_rows(weight)), found.split(_rows(weight)), strict=True):
        blocks = symmetric(rows) if kind == "q6_k" else with_minimum(rows, int(kind[1]))
        kept.copy_(blocks.values(rows.shape))
    return found


def _rows(weight: Tensor) -> int:
    return max(1, CHUNK // weight.shape[-1])
