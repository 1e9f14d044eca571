"""Pieces of more than one kernel: where a row begins; the inverse of a length; of the heads' soft-cap, running
soft-max, and reading before packing.
"""

import triton
import triton.language as tl

# Finite, so that a lane that saw nothing yet gives exp(0)·0 and not NaN.
LOWEST = tl.constexpr(-3.0e38)
# Depth of the first pass's pipeline: without one, ptxas lets each load wait for the one before it to be used. A
# soft-cap leaves no registers for it, and hides the loads behind its own work.
STAGES = tl.constexpr(2)


# The smallest normal number: below it a GPU's arithmetic may flush to 0, and the square of the inverse root overflows.
LEAST_SQUARE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def row_start(
    tensor: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    FLAT: tl.constexpr,
) -> tl.tensor:
    """Where row n (int64) of a tensor begins, by its ``launch.RowAddress``. A 64-bit division takes some sixty
    instructions, so there is none where rows lie one stride apart.
    """
    if FLAT:
        start = tensor + n * inner_stride
    else:
        start = tensor + (n // inner) * outer_stride + (n % inner) * inner_stride
    return start


@triton.jit
def inverse_root(square: tl.tensor) -> tl.tensor:
    """1/√square, 0 for the square of a length that is as good as 0."""
    return tl.where(square >= LEAST_SQUARE, 1.0 / tl.sqrt_rn(square), 0.0)


@triton.jit
def capped(z: tl.tensor, softcap: tl.tensor, HAS_CAP: tl.constexpr) -> tl.tensor:
    """c·tanh(z/c) where there is a soft-cap c; tanh by its series near 0, where the exponential form would cancel."""
    if HAS_CAP:
        x = z / softcap
        size = tl.abs(x)
        decay = tl.exp(-2.0 * size)
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
        square = x * x
        near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
        z = softcap * tl.where(size < 0.05, near, far)
    return z


@triton.jit
def lane_update(maximum: tl.tensor, total: tl.tensor, x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """One more value per lane: the sum is kept relative to the lane's own maximum, so no lane waits for another."""
    new = tl.maximum(maximum, x)
    total = total * tl.exp(maximum - new) + tl.exp(x - new)
    return new, total


@triton.jit
def lane_merge(maximum: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``(row maximum, Σ exp(x − row maximum))`` from all lanes."""
    top = tl.max(maximum, 0)
    return top, tl.sum(total * tl.exp(maximum - top), 0)


@triton.jit
def packing_barrier(block: tl.tensor, written: tl.tensor) -> tl.tensor:
    """Before 16-bit block ``block`` is stored over its own float32 row: wait until what it overwrites has been read by
    all warps.

    Block k covers the float32 blocks below (k + 1)/2. After a barrier that follows the reading of block m, all up to 2m
    + 1 may be stored, so a row takes as many barriers as its number of blocks has bits. Returns the last block that may
    be stored.
    """
    if block > written:
        tl.debug_barrier()
        written = 2 * block + 1
    return written
