"""The one comparison of the kernel tests: error relative to scale, which a zero, flipped or shifted gradient cannot
pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds, which doubles the error.
CUTS_BFLOAT16 = os.environ.get("TRITON_INTERPRET") == "1"
# Relative L2 error that the rounding of the results' dtype explains; 16-bit gradients of taps are rounded twice.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 1.2e-2 if CUTS_BFLOAT16 else 6e-3,
    torch.float16: 8e-4,
}


def relative_l2(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; 0 only for equality where ``expected`` is 0."""
    difference = torch.linalg.vector_norm(got.detach().cpu().double() - expected.detach().cpu().double())
    scale = torch.linalg.vector_norm(expected.detach().cpu().double())
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / scale)


def assert_matches(got: Tensor | None, expected: Tensor, *, tolerance: float, name: str = "value") -> None:
    """Same shape, finite, and within ``tolerance`` of ``expected`` relative to its norm; exact where
    ``expected`` is 0.
    """
    assert got is not None, f"{name}: no tensor"
    assert got.shape == expected.shape, f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = relative_l2(got, expected)
    assert error <= tolerance, f"{name}: relative L2 error {error:.3g}, allowed {tolerance:.3g}"


def assert_scale(got: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """The slope of ``got`` over ``expected`` is 1: elements' own rounding averages out, that of a common factor does
    not.
    """
    a, b = got.detach().cpu().double().flatten(), expected.detach().cpu().double().flatten()
    slope = float(a @ b / (b @ b))
    assert abs(slope - 1) <= tolerance, f"scale off by {slope - 1:.3g}, allowed {tolerance:.3g}"


def spread(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random normal values, rounded to ``dtype``, of rows that differ in scale (0.1 … 10)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if len(shape) > 1 and values.numel():
        values = values * 10 ** (2 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) - 1)
    return values.to(device=device, dtype=dtype)


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory that is ``contiguous``, ``transposed`` (first two dimensions swapped) or ``sliced``
    (gaps in rows).
    """
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.full(
            (*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        wide[..., 2 : 2 + tensor.shape[-1]] = tensor
        return wide[..., 2 : 2 + tensor.shape[-1]]
    return tensor.contiguous()
