"""``made_linear`` beside ``torch.nn.functional.linear`` on the same weights."""

from __future__ import annotations

import pytest
import torch
from repbend_kernels.blocks import made_linear
from torch.nn import functional as F


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradient_are_those_of_linear(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64)
    shift = torch.randn(5, dtype=dtype) if bias else None
    x, other = (torch.randn(3, 4, 7, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    made: list[int] = []

    def weights(wanted: torch.dtype) -> torch.Tensor:
        made.append(1)
        return weight.to(wanted)

    found, expected = made_linear(x, shift, weights), F.linear(other, weight.to(dtype), shift)
    towards = torch.randn_like(expected)
    found.backward(towards)
    expected.backward(towards)
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert x.grad is not None
    assert other.grad is not None
    exact = dtype == torch.float64
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12 if exact else 1e-2, atol=1e-12 if exact else 0.05)
    assert not torch.allclose(x.grad, other.grad.roll(1, 0), atol=0.05)
    assert not torch.allclose(x.grad, -other.grad, atol=0.05)
    assert len(made) == 2
