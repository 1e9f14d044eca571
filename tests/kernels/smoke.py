"""Every op once against its plain expression, value and gradient: what shows that an installation of the ops works.

    PYTHONPATH=tests/support python tests/kernels/smoke.py

Needs ``repbend_kernels`` and torch, nothing else.
"""

from __future__ import annotations

import torch
from kernel_compare import assert_matches, spread
from op_calls import CALLS, CPU
from repbend_kernels import implementation
from torch import Tensor

TOLERANCE = 2e-5


def outcome(name: str, chosen: str) -> tuple[Tensor, Tensor]:
    """Value and gradient of a call by one implementation."""
    leaf = spread((2, 3, 8), torch.float32, CPU, 1).requires_grad_()
    with implementation(chosen):
        value = CALLS[name](leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def check(name: str, chosen: str) -> None:
    """The outcome of ``chosen`` is the plain expression's.

    Raises:
        AssertionError: it is not, or a wrong gradient would have passed.
    """
    (value, gradient), (expected, expected_gradient) = outcome(name, chosen), outcome(name, "eager")
    assert_matches(value, expected, tolerance=TOLERANCE, name=name)
    assert_matches(gradient, expected_gradient, tolerance=TOLERANCE, name=f"{name}: gradient")
    for wrong in (torch.zeros_like(gradient), -gradient, gradient.roll(1, dims=1)):
        try:
            assert_matches(wrong, expected_gradient, tolerance=TOLERANCE)
        except AssertionError:
            continue
        raise AssertionError(f"{name}: a wrong gradient passes")


def main() -> None:
    """Checks every call in plain torch."""
    for name in CALLS:
        check(name, "torch")
    print(f"{len(CALLS)} calls right")


if __name__ == "__main__":
    main()
