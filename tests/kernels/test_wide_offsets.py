"""Columns whose offset passes 2³¹ elements: the views of a storage that is 4 GiB long and of which a few pages are
touched.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_compare import assert_matches, spread
from repbend_kernels import bend_distance, bend_tap, keyed_dropout, low_rank, pairwise_cosine
from repbend_kernels.blocks import row_hashes
from torch import Tensor

FAR = 2**30
ROWS, WIDTH = 4, 3
NAMES = ("x", "a", "b", "grad", "result", "grad_x")


@pytest.fixture
def far_apart(device, tmp_path: Path):
    """[4, 3] states whose columns lie 2³⁰ elements apart, the last one at 2³¹."""
    elements = (WIDTH - 1) * FAR + ROWS
    if device.type == "cuda":
        storage = torch.empty(elements, dtype=torch.float16, device=device)
    else:
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(2 * elements)
        storage = torch.from_file(str(path), shared=True, size=elements, dtype=torch.float16)
    states = storage.as_strided((ROWS, WIDTH), (1, FAR))
    states.copy_(spread((ROWS, WIDTH), torch.float16, device, 1))
    return states.requires_grad_()


def tap(states: Tensor, implementation: str) -> Tensor:
    rows = torch.tensor([2, 0], device=states.device)
    reference = spread((2, WIDTH), torch.float16, states.device, 2).to(states.dtype)
    stream, loss = bend_tap(states, reference, rows, kind="mse", implementation=implementation)
    return loss + (stream * 0.5).sum().to(loss.dtype)


def incoming(states: Tensor, implementation: str) -> Tensor:
    """The gradient that comes back to the tap has the far columns."""
    rows = torch.tensor([2, 0], device=states.device)
    leaf = torch.zeros(ROWS, WIDTH, dtype=states.dtype, device=states.device, requires_grad=True)
    stream, loss = bend_tap(
        leaf, torch.ones(2, WIDTH, dtype=states.dtype, device=states.device), rows, implementation=implementation
    )
    return torch.autograd.grad([stream, loss], [leaf], [states.detach(), torch.ones_like(loss)])[0]


def reference(states: Tensor, implementation: str) -> Tensor:
    hidden = spread((ROWS, WIDTH), torch.float16, states.device, 3).to(states.dtype)
    return bend_distance(hidden, states.detach(), kind="mse", implementation=implementation)


OPS = {
    "bend_tap": tap,
    "incoming gradient": incoming,
    "reference": reference,
    "bend_distance": lambda s, i: bend_distance(
        s, torch.zeros(1, WIDTH, dtype=s.dtype, device=s.device), kind="mse", implementation=i
    ),
    "pairwise_cosine": lambda s, i: pairwise_cosine(s[None], implementation=i),
    "keyed_dropout": lambda s, i: (
        keyed_dropout(s, torch.arange(ROWS, device=s.device), 3, 0.4, implementation=i).double().pow(2).sum()
    ),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_columns_beyond_32_bits(implementation, device, far_apart, op) -> None:
    near = far_apart.detach().contiguous().double().requires_grad_()
    got, expected = op(far_apart, implementation), op(near, "eager")
    assert_matches(got, expected, tolerance=8e-4)
    if got.requires_grad:
        (grad,) = torch.autograd.grad(got, far_apart)
        assert_matches(grad, torch.autograd.grad(expected, near)[0], tolerance=8e-4)


@pytest.mark.parametrize("far", ["x", "a", "b", "grad", "result", "grad_x"])
def test_low_rank_columns_beyond_32_bits(implementation, device, far_apart, far) -> None:
    """Every wide tensor of the low-rank products, one at a time."""
    where = far_apart.detach()
    dtype, hashes = where.dtype, row_hashes(torch.arange(ROWS, device=device))
    if implementation == "torch" and device.type == "cpu":
        pytest.skip("PyTorch's own indexing")
    results = []
    for chosen, tensor in ((implementation, where), ("torch", where.contiguous())):
        near = {name: spread((ROWS, WIDTH), torch.float16, device, i).to(dtype) for i, name in enumerate(NAMES)}
        near[far] = tensor if far in ("x", "a", "b", "grad") else tensor.copy_(near[far])
        down, up = spread((ROWS, WIDTH), torch.float32, device, 8), spread((ROWS, ROWS), torch.float32, device, 9)
        low_rank.add_low_rank_up_(near["result"], down, near["b"][:WIDTH], 1.5, chosen)
        grads = low_rank.low_rank_up_gradients(near["grad"], down, near["b"][:WIDTH], 1.5, [True, True], chosen)
        found = low_rank.low_rank_down(near["x"], [near["a"]], hashes, 3, 0.4, chosen)
        grad_a = low_rank.add_low_rank_gradient_(
            near["grad_x"], near["x"], [near["a"]], [up], hashes, 3, 0.4, [True, True], chosen
        )
        results.append([near["result"].clone(), *grads, found, grad_a, near["grad_x"].clone()])
    for got, expected in zip(*results):
        assert_matches(got, expected, tolerance=8e-4)
