"""``lora_down`` and ``lora_up``: the low-rank part of one adapted layer, forward and backward, without the base
layer's products, against PEFT's expression.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from repbend_kernels import lora_down, lora_up
from repbend_kernels.blocks import row_hashes
from torch import Tensor

from benchmarks.harness import Call, Measure, Result, Work

Size = tuple[int, int, int, int]
PLACE, P, SCALING = 3, 0.05, 2.0

# Rows, inputs, outputs, rank: the layers of an 8B model at a stream's tokens.
SIZES = {
    "smoke": [(40, 24, 56, 4)],
    "cpu": [(1024, 576, 1536, 16)],
    "cuda": [(1456, 4096, 14336, 16)],
    "sweep": [
        (rows, inner, outer, rank)
        for rows in (1456, 5560)
        for inner, outer in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
        for rank in (16, 64)
    ],
}


class Layer(NamedTuple):
    """Input, base layer's output, their gradients without the low-rank part's, adapter, hashed keys."""

    x: Tensor
    y: Tensor
    grad_x: Tensor
    grad: Tensor
    a: Tensor
    b: Tensor
    hashes: Tensor | None


def layer(device: torch.device, dtype: torch.dtype, size: Size, seed: int, dropout: bool) -> Layer:
    rows, inner, outer, rank = size
    generator = torch.Generator(device=device).manual_seed(seed)

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hashes = row_hashes(torch.arange(rows, device=device)) if dropout else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = values(rank, inner, dtype=wide) / inner**0.5, values(outer, rank, dtype=wide)
    return Layer(values(rows, inner), values(rows, outer), values(rows, inner), values(rows, outer), a, b, hashes)


def ours(of: Layer) -> Call:
    """y and the gradient of x are added to in place, so the first call's result is the one that is checked."""
    p = 0.0 if of.hashes is None else P
    leaves = [tensor.detach().requires_grad_() for tensor in (of.x, of.a, of.b)]
    y, grad_x = of.y.clone(), of.grad_x.clone()

    def call() -> Result:
        x, a, b = leaves
        source, down = lora_down(x, a, of.hashes, PLACE, p)
        result = lora_up(y.detach(), down, b, SCALING / (1 - p))
        return result.detach(), list(torch.autograd.grad([source, result], leaves, [grad_x, of.grad]))

    return call


def eager(of: Layer) -> Call:
    """PEFT's: the input in the adapter's dtype, and a new tensor for each step."""
    leaves = [tensor.detach().requires_grad_() for tensor in (of.x, of.a, of.b)]

    def call() -> Result:
        x, a, b = leaves
        y = of.y + (SCALING * (x.to(a.dtype) @ a.T) @ b.T).to(of.y.dtype)
        grad_x, *grads = torch.autograd.grad(y, leaves, of.grad)
        return y.detach(), [of.grad_x + grad_x, *grads]

    return call


def exact(of: Layer) -> Result:
    """By the oracles, in float64."""
    p = 0.0 if of.hashes is None else P
    leaves = [tensor.double().requires_grad_() for tensor in (of.x, of.a, of.b)]
    x, a, b = leaves
    source, down = lora_down(x, a, of.hashes, PLACE, p, implementation="eager")
    y = lora_up(of.y.double(), down, b, SCALING / (1 - p), implementation="eager")
    grads = torch.autograd.grad([source, y], leaves, [of.grad_x.double(), of.grad.double()])
    return y.detach(), list(grads)


CONTENDERS = {"ours": (ours, True), "ours, no dropout": (ours, False), "eager, no dropout": (eager, False)}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_low_rank(
    measured: Measure, device: torch.device, dtype: torch.dtype, smoke: bool, size: Size, contender: str
) -> None:
    run, dropout = CONTENDERS[contender]
    sets = 1 if smoke else 4 if device.type == "cuda" else 2
    data = [layer(device, dtype, size, seed, dropout) for seed in range(sets)]
    rows, inner, outer, rank = size
    # Forward reads x, reads and writes y; backward reads G and x, and reads and writes x's gradient.
    moved = data[0].x.element_size() * rows * (4 * inner + 3 * outer)
    case = f"{rows}x{inner}x{outer} r {rank}"
    calls = [run(of) for of in data]
    measured(Work("lora", case, contender, calls, exact(data[0]), tolerance=3e-2, bytes_moved=moved))
