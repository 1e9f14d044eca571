"""Arguments that are views with gaps, rows that are not finite, and autocast around an op: every implementation gives
the same.
"""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, spread
from repbend_kernels import (
    bend_distance,
    bend_tap,
    head,
    keyed_dropout,
    linear_kl_div,
    linear_log_prob,
    pairwise_cosine,
    tap_rows,
    window_distance,
)
from repbend_kernels.bend_distance import row_distance, row_distance_backward
from torch import Tensor

N, D, V = 12, 40, 70


@pytest.mark.parametrize("cut", ["last", "every other", "one for all"])
def test_masks_with_gaps(implementation, device, cut) -> None:
    states, references = (
        [spread((2, N, D), torch.float32, device, 3 * side + i) for i in range(2)] for side in range(2)
    )
    whole = torch.arange(2 * 2 * N, device=device).view(2, 2 * N) % 3 == 0
    mask = {
        "last": whole[:, -N:],
        "every other": whole[:, ::2],
        "one for all": torch.ones((), dtype=torch.bool, device=device).expand(2, N),
    }[cut]
    got = window_distance(states, references, mask, implementation=implementation)
    assert_matches(got, window_distance(states, references, mask.clone(), implementation="eager"), tolerance=1e-6)


@pytest.mark.parametrize("cut", ["column", "every other", "one for all"])
def test_targets_with_gaps(implementation, device, cut) -> None:
    hidden, weight = spread((N, D), torch.float32, device, 1), spread((V, D), torch.float32, device, 2)
    ids = torch.arange(N * 3, device=device).view(N, 3) * 5 % V
    targets = {"column": ids[:, 1], "every other": ids.flatten()[: 2 * N : 2], "one for all": ids[3, :1].expand(N)}[cut]
    got = linear_log_prob(hidden, weight, targets, chunk_rows=5, implementation=implementation)
    assert_matches(got, linear_log_prob(hidden, weight, targets.clone(), implementation="eager"), tolerance=1e-6)


def test_states_that_are_a_column_of_a_larger_tensor(implementation, device) -> None:
    states = spread((3, 5, 7, D), torch.float32, device, 1)[:, :, -1].requires_grad_()
    got = pairwise_cosine(states, implementation=implementation)
    (grad,) = torch.autograd.grad(got, states)
    expected = pairwise_cosine(states, implementation="eager")
    assert_matches(got, expected, tolerance=1e-6)
    assert_matches(grad, torch.autograd.grad(expected, states)[0], tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("cut", ["column", "every other"])
def test_rows_with_gaps(implementation, device, cut) -> None:
    pairs = torch.tensor([[9, 1], [0, 2], [5, 3], [7, 4]], device=device)
    rows = pairs[:, 0] if cut == "column" else pairs.flatten()[::2]
    reference = spread((4, D), torch.float32, device, 2)
    for op in (bend_tap, tap_then_sum, bend_distance):
        results = []
        for chosen, index in ((implementation, rows), ("eager", rows.clone())):
            leaf = spread((2, N // 2, D), torch.float32, device, 1).requires_grad_()
            out = op(leaf, reference.clone(), index, kind="mse", implementation=chosen)
            value = out if isinstance(out, Tensor) else (out[0] * 0.5).sum() + out[1] / 3
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        for got, expected in zip(*results):
            assert_matches(got, expected, tolerance=TOLERANCE[torch.float32])


def tap_then_sum(hidden, reference, rows, *, kind, implementation) -> Tensor:
    _, copy = tap_rows(hidden, rows, implementation=implementation)
    return (copy - reference).square().sum()


def test_keys_with_gaps(implementation, device) -> None:
    keys = (torch.arange(2 * N, device=device) * 7919)[::2]
    x = spread((N, D), torch.float32, device, 1)
    got = keyed_dropout(x, keys, 3, 0.4, implementation=implementation)
    assert torch.equal(got == 0, keyed_dropout(x, keys.clone(), 3, 0.4, implementation="eager") == 0)


def test_rows_and_a_mask_together(implementation, device) -> None:
    """The op takes both: what the mask leaves out is 0, an index out of range is no value."""
    hidden, reference = spread((N, D), torch.float32, device, 1), spread((4, D), torch.float32, device, 2)
    rows, mask = torch.tensor([9, 0, 5, 7], device=device), torch.tensor([True, False, True, True], device=device)
    got = row_distance([hidden], [reference], rows, mask, "l2", implementation)[0]
    expected = torch.where(mask, (hidden.double()[rows] - reference.double()).norm(dim=-1), 0.0)
    assert_matches(got, expected, tolerance=3e-6)
    if implementation == "triton":
        # Far enough out to be foreign memory: read, it would end the process.
        outside = torch.tensor([9, 0, 2**45, 7], device=device)
        got = row_distance([hidden], [reference], outside, mask, "l2", implementation)[0]
        assert got.isnan().tolist() == [False, False, True, False]
        factor = torch.ones(4, device=device)
        grad = row_distance_backward(hidden, reference, outside, mask, "mse", factor, implementation)
        expected = torch.zeros(N, D, dtype=torch.float64, device=device)
        expected[[9, 7]] = (hidden.double()[[9, 7]] - reference.double()[[0, 3]]) * 2 / D
        assert_matches(grad, expected, tolerance=TOLERANCE[torch.float32])


def test_parallel_rows_are_never_nearer_than_equal_ones(implementation, device) -> None:
    """Rounding takes some cosines of parallel rows above 1; a distance below 0 must not come of it."""
    hidden = spread((200, D), torch.float32, device, 1)
    distances = torch.stack(
        [bend_distance(row[None], row[None] * 3, kind="cosine", implementation=implementation) for row in hidden]
    )
    assert distances.min() >= 0
    aligned = torch.stack(
        [bend_distance(row[None], row[None] * 3, kind="relu_cosine", implementation=implementation) for row in hidden]
    )
    assert aligned.max() <= 1
    assert aligned.min() > 1 - 1e-6


@pytest.mark.parametrize("left", [0, 1, -1, 2**31 - 1])
def test_whatever_lies_in_the_memory_of_unselected_places(implementation, device, left) -> None:
    if implementation != "triton":
        pytest.skip("the torch path keeps no places")
    from repbend_kernels.triton.row_distance import launch_tap_backward

    rows = torch.tensor([9, 0, 5], device=device)
    direction, grad = spread((3, D), torch.float32, device, 1), spread((N, D), torch.float32, device, 2)
    place = torch.full((N,), left, dtype=torch.int32, device=device)
    place[rows] = torch.arange(3, dtype=torch.int32, device=device)
    got = launch_tap_backward(grad, direction, rows, place, torch.tensor(0.5, device=device), [N, D])
    expected = grad.double().index_add(0, rows, direction.double() * 0.5)
    assert_matches(got, expected, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("side", ["hidden", "reference"])
@pytest.mark.parametrize("kind", ["l2", "cosine", "relu_cosine", "mse"])
@pytest.mark.parametrize("width", [D, 9000], ids=["narrow", "wide"])
def test_a_row_with_a_nan_is_neither_near_nor_far(implementation, device, kind, side, width) -> None:
    """A GPU's maximum of -1 and NaN is -1, which would make a broken row a distance of 2 or 0."""
    rows = {
        "hidden": spread((4, width), torch.float32, device, 1),
        "reference": spread((4, width), torch.float32, device, 2),
    }
    rows[side][1, 3] = float("nan")
    distances = [
        bend_distance(rows["hidden"][i : i + 1], rows["reference"][i : i + 1], kind=kind, implementation=implementation)
        for i in range(4)
    ]
    assert [bool(torch.isnan(distance)) for distance in distances] == [False, True, False, False]


def head_gradient(op: str, hidden: Tensor, implementation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a head's loss with operands in ``dtype``, which follow ``hidden``'s."""
    leaf = hidden.detach().requires_grad_()
    other, weight = (
        spread(shape, torch.float32, hidden.device, i).to(dtype) for i, shape in ((1, (N, D)), (2, (V, D)))
    )
    bias = spread((1, V), torch.float32, hidden.device, 3)[0].to(dtype)
    if op == "kl":
        loss = linear_kl_div(leaf.to(dtype), other, weight, bias=bias, implementation=implementation)
    else:
        targets = torch.arange(N, device=hidden.device)
        loss = linear_log_prob(leaf.to(dtype), weight, targets, bias=bias, implementation=implementation).sum()
    assert loss.dtype == torch.float32
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("op", ["kl", "log prob"])
def test_autocast_around_a_head_op_changes_nothing(implementation, device, op) -> None:
    """The gradient is made in forward: in 16 bits it would be some tenths of a per cent off. Where the device's
    products are made for 16-bit operands, see below.
    """
    if head.takes_narrow(device):
        pytest.skip("there it takes autocast's dtype")
    hidden = spread((N, D), torch.float32, device, 0)
    plain = head_gradient(op, hidden, implementation)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(head_gradient(op, hidden, implementation), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("op", ["kl", "log prob"])
def test_autocast_takes_a_head_s_operands_where_products_are_narrow(
    implementation, device, monkeypatch, op, dtype
) -> None:
    """What explicit 16-bit operands give, with a bias that keeps its bits; the logits stay in float32."""
    monkeypatch.setattr(head, "takes_narrow", lambda device: True)
    hidden = spread((N, D), torch.float32, device, 0)
    with torch.autocast(device.type, dtype):
        got = head_gradient(op, hidden, implementation)
    narrow, plain = head_gradient(op, hidden, implementation, dtype), head_gradient(op, hidden, implementation)
    assert got.dtype == torch.float32
    assert_matches(got, narrow, tolerance=TOLERANCE[dtype])
    assert_matches(got, plain, tolerance=10 * TOLERANCE[dtype])
    assert not torch.equal(got, plain)


def test_autocast_leaves_float64_and_narrow_operands_alone(monkeypatch) -> None:
    monkeypatch.setattr(head, "takes_narrow", lambda device: True)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float64, torch.float16):
            operand = torch.ones(2, 3, dtype=dtype)
            assert head.autocast_operands(operand)[0] is operand
    operand = torch.ones(2, 3)
    assert head.autocast_operands(operand)[0] is operand
