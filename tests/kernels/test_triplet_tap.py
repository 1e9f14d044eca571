"""``triplet_tap`` and ``triplet_sums``: loss and gradient against the plain expression, for a whole batch and for parts
of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, relative_l2, spread
from repbend_kernels import TripletSums, triplet_sums, triplet_tap
from torch import Tensor

SHAPE, WIDTH = (3, 5, 16), 16
SAFE, UNSAFE = [14, 0, 3, 8], [2, 11, 5, 9, 7]
WEIGHTS = (0.7, 1.9)
# With the second every v is above 0; with the first some are not.
MARGINS = {"some inactive": (0.3, 0.2), "all active": (2.0, 2.0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def inputs(dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    """Hidden states with a zero row among the selected ones, and references."""
    hidden = spread(SHAPE, dtype, device, 1)
    hidden.view(-1, WIDTH)[UNSAFE[1]] = 0
    return hidden, spread((len(SAFE) + len(UNSAFE), WIDTH), dtype, device, 2)


def halves(device: Any, safe: list[int] = SAFE, unsafe: list[int] = UNSAFE) -> tuple[Tensor, Tensor]:
    return torch.tensor(safe, dtype=torch.int64, device=device), torch.tensor(unsafe, dtype=torch.int64, device=device)


def outcome(hidden: Tensor, reference: Tensor, rows: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient, the stream used beside the loss."""
    leaf = hidden.detach().requires_grad_()
    stream, loss, values = triplet_tap(leaf, reference.clone(), rows, weights=WEIGHTS, **options)
    assert torch.equal(stream, hidden)
    assert not any(value.requires_grad for value in values)
    weighted = WEIGHTS[0] * values[0] + WEIGHTS[1] * values[1]
    assert_matches(loss, weighted, tolerance=1e-6)
    (gradient,) = torch.autograd.grad((stream * 0.01).sum() + loss * 3.0, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("unit", [1.0, 7.5, None])
@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_loss_and_gradient(device, dtype, margins, unit) -> None:
    hidden, reference = inputs(dtype, device)
    rows = halves(device)
    loss, gradient = outcome(hidden, reference, rows, margins=margins, unit=unit)
    assert gradient.dtype == dtype
    exact_loss, exact = outcome(
        hidden.double(), reference.double(), rows, margins=margins, unit=unit, implementation="eager"
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The rows themselves are exact in float64; a loss of 16-bit rows is summed in float32.
    assert_matches(loss.double(), exact_loss, tolerance=1e-12 if dtype == torch.float64 else 3e-6)
    assert_matches(gradient, exact, tolerance=TOLERANCE[dtype])
    for wrong in (torch.zeros_like(exact), -exact, exact.view(-1, WIDTH).roll(1, 0).view(SHAPE)):
        assert relative_l2(wrong, exact) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS.keys())
def test_the_mean_s_way_back_shows(device, margins) -> None:
    """Without the part through m the gradient would be another, so the comparisons above see it."""
    hidden, reference = inputs(torch.float64, device)
    rows = halves(device)
    _, whole = outcome(hidden, reference, rows, margins=margins)
    known = triplet_sums(hidden, rows)
    still = TripletSums(known.unsafe, (torch.zeros_like(known.unsafe), torch.zeros_like(known.unsafe)))
    _, without = outcome(hidden, reference, rows, margins=margins, sums=still)
    assert relative_l2(without, whole) > 1e-3


def parts(safe: int, unsafe: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Two parts of the rows: safe and unsafe ones, and which rows of the reference are theirs."""
    for safes, unsafes in ((slice(0, safe), slice(0, unsafe)), (slice(safe, None), slice(unsafe, None))):
        kept = [*range(len(SAFE))[safes], *(len(SAFE) + i for i in range(len(UNSAFE))[unsafes])]
        yield SAFE[safes], UNSAFE[unsafes], kept


@pytest.mark.parametrize("implementation_of_sums", ["torch", "eager"])
@pytest.mark.parametrize("cut", [(2, 3), (0, 2), (4, 5)], ids=["both cut", "one without safe rows", "one empty"])
@pytest.mark.parametrize("margins", MARGINS.values(), ids=MARGINS.keys())
def test_parts_add_up_to_the_whole(device, margins, cut, implementation_of_sums) -> None:
    hidden, reference = inputs(torch.float64, device)
    expected_loss, expected = outcome(hidden, reference, halves(device), margins=margins)
    expected = expected - 0.01
    pieces = [(halves(device, safe, unsafe), reference[kept]) for safe, unsafe, kept in parts(*cut)]
    total: TripletSums | None = None
    for rows, _ in pieces:
        total = triplet_sums(hidden, rows, implementation=implementation_of_sums).plus(total)
    assert total is not None
    active: TripletSums | None = None
    for rows, kept in pieces:
        options = {"known": total, "reference": kept, "margins": margins, "implementation": implementation_of_sums}
        active = triplet_sums(hidden, rows, **options).plus(active)
    assert active is not None
    assert not active.unsafe.any()
    sums = TripletSums(total.unsafe, active.units)
    for chosen in ("torch", "eager"):
        found = [
            outcome(hidden, kept, rows, margins=margins, sums=sums, unsafe_rows=5, implementation=chosen)
            for rows, kept in pieces
        ]
        assert_matches(found[0][0] + found[1][0], expected_loss, tolerance=1e-12)
        assert_matches(found[0][1] + found[1][1] - 0.02, expected, tolerance=1e-11)


def test_a_half_without_weight_may_hold_anything(device) -> None:
    hidden, reference = inputs(torch.float32, device)
    reference[0] = float("inf")
    leaf = hidden.detach().requires_grad_()
    _, loss, values = triplet_tap(leaf, reference, halves(device), weights=(0.0, 1.0), margins=(2.0, 2.0))
    assert torch.isinf(values[0])
    assert torch.isfinite(loss)


def test_a_reference_is_used_once_and_only_where_a_gradient_is_wanted(device) -> None:
    hidden, reference = inputs(torch.float32, device)
    before, rows = reference.clone(), halves(device)
    options: dict[str, Any] = {"weights": WEIGHTS, "margins": (2.0, 2.0)}
    triplet_tap(hidden, reference, rows, **options)
    with torch.no_grad():
        triplet_tap(hidden.detach().requires_grad_(), reference, rows, **options)
    assert torch.equal(reference, before)
    leaf = hidden.detach().requires_grad_()
    triplet_tap(leaf, reference, rows, **options)
    assert not torch.equal(reference, before)
    with pytest.raises(RuntimeError, match="reference: this memory holds directions already"):
        triplet_tap(leaf, reference, rows, **options)
    reference.copy_(before)
    triplet_tap(leaf, reference, rows, **options)


def test_autocast_leaves_the_sums_in_float32(device) -> None:
    hidden, reference = inputs(torch.float32, device)
    plain = outcome(hidden, reference, halves(device), margins=(2.0, 2.0))
    with torch.autocast(device.type, torch.bfloat16):
        cast = outcome(hidden, reference, halves(device), margins=(2.0, 2.0))
    for got, expected in zip(cast, plain):
        assert torch.equal(got, expected)
