"""``tap_rows``: copy and gradient against plain indexing."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, spread, strided
from repbend_kernels import tap_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("indices", [[], [3], [7, 0, 3]], ids=["none", "one", "three"])
def test_copy_and_gradient(implementation, device, dtype, layout, indices) -> None:
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on the torch path only")
    rows = torch.tensor(indices, dtype=torch.int64, device=device)
    hidden, weight = strided(spread((2, 4, 10), dtype, device, 1), layout), spread((len(indices), 10), dtype, device, 2)
    leaf = hidden.detach().requires_grad_()
    stream, copy = tap_rows(leaf, rows, implementation=implementation)
    assert torch.equal(stream, hidden)
    assert torch.equal(copy, hidden.reshape(-1, 10)[rows])
    (stream * 0.5).sum().add((copy * weight).sum()).backward()
    other = hidden.detach().double().requires_grad_()
    (other * 0.5).sum().add((other.reshape(-1, 10)[rows] * weight.double()).sum()).backward()
    assert_matches(leaf.grad, other.grad, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("used", ["stream", "copy"])
def test_one_output_unused(implementation, device, used) -> None:
    rows = torch.tensor([5, 1], device=device)
    leaf = spread((2, 3, 4), torch.float32, device, 1).requires_grad_()
    stream, copy = tap_rows(leaf, rows, implementation=implementation)
    (stream if used == "stream" else copy).sum().backward()
    expected = torch.ones_like(leaf) if used == "stream" else torch.zeros_like(leaf)
    expected.view(-1, 4)[rows] = 1
    assert torch.equal(leaf.grad, expected)


def test_without_gradient(implementation, device) -> None:
    hidden = spread((2, 3, 4), torch.float32, device, 1)
    stream, copy = tap_rows(hidden, torch.tensor([2], device=device), implementation=implementation)
    assert stream is hidden
    assert torch.equal(copy[0], hidden[0, 2])


def test_rows_wider_than_a_block(implementation, device) -> None:
    rows = torch.tensor([2, 0], device=device)
    hidden, weight = spread((3, 4100), torch.float32, device, 1), spread((2, 4100), torch.float32, device, 2)
    leaf = hidden.clone().requires_grad_()
    stream, copy = tap_rows(leaf, rows, implementation=implementation)
    assert torch.equal(copy, hidden[rows])
    torch.autograd.backward([stream, copy], [hidden, weight])
    assert torch.equal(leaf.grad, hidden.index_add(0, rows, weight))


def test_a_second_derivative(implementation, device) -> None:
    rows = torch.tensor([4, 1], device=device)
    hidden = spread((2, 3, 4), torch.float32, device, 1)
    grads = []
    for way in (implementation, "eager"):
        leaf = hidden.clone().requires_grad_()
        stream, copy = tap_rows(leaf * 1, rows, implementation=way)
        (first,) = torch.autograd.grad(copy.pow(3).sum() + stream.square().sum(), leaf, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_matches(*grads, tolerance=TOLERANCE[torch.float32])


def test_a_row_that_is_not_there(implementation, device) -> None:
    hidden = spread((2, 3, 4), torch.bfloat16, device, 1).requires_grad_()
    rows = torch.tensor([1, 6, -1], device=device)
    if implementation != "triton" and device.type == "cpu":
        with pytest.raises(IndexError):
            tap_rows(hidden, rows, implementation=implementation)
        return
    _, copy = tap_rows(hidden, rows, implementation="triton")
    assert torch.equal(copy[0], hidden[0, 1])
    assert copy[1:].isnan().all()
    copy[0].sum().backward()
    expected = torch.zeros(6, 4, dtype=torch.bfloat16, device=device)
    expected[1] = 1
    assert torch.equal(hidden.grad.view(6, 4), expected)


def test_no_rows_at_all(implementation, device) -> None:
    hidden = torch.zeros(2, 0, 4, device=device, requires_grad=True)
    stream, copy = tap_rows(hidden, torch.zeros(0, dtype=torch.int64, device=device), implementation=implementation)
    (stream.sum() + copy.sum()).backward()
    assert hidden.grad.shape == (2, 0, 4)


def test_gradcheck() -> None:
    hidden = spread((2, 3, 4), torch.float64, torch.device("cpu"), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: tap_rows(h * 1, torch.tensor([5, 0])), hidden)
