"""The comparison itself: a wrong gradient must fail at every tolerance in use."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, assert_scale, spread, strided

EXPECTED = spread((6, 8), torch.float64, torch.device("cpu"), seed=0) * 1e-7

WRONG = {
    "zeroed": torch.zeros_like(EXPECTED),
    "sign-flipped": -EXPECTED,
    "row-shifted": EXPECTED.roll(1, dims=0),
    "column-shifted": EXPECTED.roll(1, dims=1),
    "one row missing": torch.cat([EXPECTED[:2] * 0, EXPECTED[2:]]),
    "scaled by 1.02": EXPECTED * 1.02,
    "not finite": torch.full_like(EXPECTED, float("nan")),
    "infinite": torch.full_like(EXPECTED, float("inf")),
}


@pytest.mark.parametrize("tolerance", TOLERANCE.values(), ids=[str(dtype) for dtype in TOLERANCE])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_gradients_fail(wrong: torch.Tensor, tolerance: float) -> None:
    with pytest.raises(AssertionError):
        assert_matches(wrong, EXPECTED, tolerance=tolerance)


def test_wrong_shape_and_missing_tensor_fail() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_matches(EXPECTED[:1], EXPECTED, tolerance=1.0)
    with pytest.raises(AssertionError, match="no tensor"):
        assert_matches(None, EXPECTED, tolerance=1.0)


def test_anything_but_zero_fails_against_zero() -> None:
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([1e-30]), torch.zeros(1), tolerance=1.0)
    assert_matches(torch.zeros(1), torch.zeros(1), tolerance=0.0)


def test_rounding_passes() -> None:
    for dtype, tolerance in TOLERANCE.items():
        assert_matches(EXPECTED.mul(1e5).to(dtype), EXPECTED.mul(1e5), tolerance=tolerance)


@pytest.mark.parametrize("name", [*WRONG, "a factor"])
def test_the_scale_of_a_wrong_gradient_is_not_1(name: str) -> None:
    assert_scale(EXPECTED.mul(1e5).to(torch.bfloat16), EXPECTED.mul(1e5), tolerance=6e-4)
    with pytest.raises(AssertionError, match="scale off"):
        assert_scale(WRONG.get(name, EXPECTED * 1.002), EXPECTED, tolerance=6e-4)


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(4).isnan().all()
    assert torch.ones(3).new_empty(4).isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_layouts_keep_values(layout: str) -> None:
    values = torch.randn(3, 4, 5)
    assert torch.equal(strided(values, layout), values)
    assert strided(values, layout).is_contiguous() == (layout == "contiguous")
