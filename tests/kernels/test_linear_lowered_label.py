"""``linear_lowered_label`` against full logits and PyTorch's own cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, relative_l2, spread
from repbend_kernels import linear_lowered_label
from torch.nn import functional as F

INF = float("inf")


def states(rows: int, dtype: torch.dtype, device: torch.device, vocabulary: int = 90):
    hidden, reference = (spread((rows, 32), dtype, device, seed) for seed in (1, 2))
    weight = spread((vocabulary, 32), dtype, device, 3) * 0.4
    return hidden, reference, weight, torch.arange(rows, device=device) * 7 % vocabulary


def expected_of(hidden, weight, labels, lowered, reference=None, bias=None, softcap=None):
    """Losses and the gradient of their weighted sum, in float64."""
    hidden = hidden.detach().double().requires_grad_()

    def logits(x):
        z = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    target = logits(hidden if reference is None else reference).detach().clone()
    target[torch.arange(len(labels)), labels] -= lowered
    losses = F.cross_entropy(logits(hidden), target.softmax(-1), reduction="none")
    (losses * torch.arange(1, len(labels) + 1)).sum().backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("lowered", "own"), [(10.0, False), (0.5, False), (INF, False), (INF, True), (3.0, True)])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "bias": True}], ids=["plain", "softcap and bias"])
def test_losses_and_gradient(dtype, lowered, own, options) -> None:
    device = torch.device("cpu")
    hidden, reference, weight, labels = states(7, dtype, device)
    given = {"reference": None if own else reference}
    if options:
        given |= {"softcap": 2.0, "bias": spread((90,), dtype, device, 5)}
    leaf = hidden.detach().requires_grad_()
    losses = linear_lowered_label(leaf, weight, labels, lowered=lowered, chunk_rows=3, **given)
    (losses * torch.arange(1, 8)).sum().backward()
    value, gradient = expected_of(hidden, weight, labels, lowered, **given)
    assert losses.dtype == torch.float32
    assert_matches(losses, value, tolerance=3e-6)
    assert_matches(leaf.grad, gradient, tolerance=max(1e-5, 2 * TOLERANCE[dtype]))
    for wrong in (torch.zeros_like(gradient), -gradient, gradient.roll(1, dims=0)):
        assert relative_l2(leaf.grad, wrong) > 0.1
    eager = linear_lowered_label(hidden, weight, labels, lowered=lowered, implementation="eager", **given)
    assert_matches(eager, value, tolerance=3e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows) -> None:
    hidden, reference, weight, labels = states(rows, torch.float64, torch.device("cpu"))
    leaf = hidden.requires_grad_()
    losses = linear_lowered_label(leaf, weight, labels, lowered=2.0, reference=reference)
    losses.sum().backward()
    assert losses.shape == (rows,)
    assert leaf.grad.shape == (rows, 32)


def test_a_word_that_is_never_said_has_no_share(device) -> None:
    hidden, reference, weight, labels = states(4, torch.float64, torch.device("cpu"))
    bias = torch.zeros(90, dtype=torch.float64)
    bias[50] = -INF
    kept = torch.arange(90) != 50
    for teacher in (reference, None):
        leaf, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        losses = linear_lowered_label(leaf, weight, labels, lowered=INF, reference=teacher, bias=bias)
        less = linear_lowered_label(other, weight[kept], labels, lowered=INF, reference=teacher)
        losses.sum().backward()
        less.sum().backward()
        assert_matches(losses, less, tolerance=1e-12)
        assert_matches(leaf.grad, other.grad, tolerance=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_gradcheck(own) -> None:
    hidden, reference, weight, labels = states(3, torch.float64, torch.device("cpu"), vocabulary=20)
    # The own target moves with a finite difference, so it is held at where it was: as the reference.
    known = hidden.clone() if own else reference
    leaf = hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: linear_lowered_label(h, weight, labels, lowered=INF if own else 10.0, reference=known), (leaf,)
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"lowered": 0.0}, ValueError, "lowered: expected a number > 0, or inf, got 0.0"),
        ({"reference": torch.zeros(3, 8)}, ValueError, "reference: expected shape"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "labels: expected shape"),
        ({"labels": torch.zeros(3)}, TypeError, "labels: expected an int64 tensor"),
        ({"weight": torch.zeros(9, 32, requires_grad=True)}, ValueError, "weight: expected a tensor that requires no"),
    ],
)
def test_what_does_not_fit(change, error, text) -> None:
    hidden, _, weight, labels = states(3, torch.float32, torch.device("cpu"))
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "lowered": 2.0} | change
    with pytest.raises(error, match=text):
        linear_lowered_label(**arguments)
