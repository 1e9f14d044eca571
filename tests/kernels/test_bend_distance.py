"""``bend_distance`` and ``window_distance`` against the float64 oracles."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, spread, strided
from repbend_kernels import KINDS, bend_distance, window_distance
from repbend_kernels.oracles import bend_distance_reference, window_distance_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
BEND_SHAPES = {
    "all-rows": ((2, 3, 40), None),
    "no-rows": ((2, 3, 8), []),
    "empty": ((0, 8), None),
    "one-row": ((2, 3, 8), [4]),
    "width-1": ((2, 3, 1), [5, 0]),
    "ragged": ((3, 7, 130), [20, 0, 13]),
    "beyond-one-block": ((1, 3, 9001), None),
}


def both(leaf_of, call, expected_call):
    """``(got value, got gradients, expected value, expected gradients)``."""
    leaves = leaf_of()
    value = call(*leaves)
    grads = torch.autograd.grad(value * 3, leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = expected_call(*doubles)
    return value.detach(), grads, expected.detach(), torch.autograd.grad(expected * 3, doubles)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BEND_SHAPES.values(), ids=BEND_SHAPES.keys())
def test_bend_distance(implementation, device, kind, shape, dtype) -> None:
    size, indices = shape
    reduction = "sum" if len(size) == 3 and size[0] == 2 else "mean"
    rows = None if indices is None else torch.tensor(indices, dtype=torch.int64, device=device)
    hidden = spread(size, dtype, device, 1)
    reference = spread(size if rows is None else (len(indices), size[-1]), dtype, device, 2)
    value, grads, expected, expected_grads = both(
        lambda: [hidden.detach().requires_grad_()],
        lambda h: bend_distance(h, reference, rows, kind=kind, reduction=reduction, implementation=implementation),
        lambda h: bend_distance_reference(h, reference.double(), rows, kind, reduction),
    )
    assert_matches(value, expected, tolerance=3e-6)
    if size[-1] == 1 and "cosine" in kind:
        # Vectors of width 1 are parallel: the exact gradient is 0, and rounding is measured against 1/‖h‖.
        assert (grads[0] * hidden).abs().max() <= 1e-5
    else:
        assert_matches(grads[0], expected_grads[0], tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [None, [3, 1]], ids=["all", "rows"])
def test_bend_distance_broadcast_reference(implementation, device, rows) -> None:
    index = None if rows is None else torch.tensor(rows, device=device)
    hidden, reference = spread((2, 3, 20), torch.float32, device, 3), spread((1, 20), torch.float32, device, 4)
    value, grads, expected, expected_grads = both(
        lambda: [hidden.detach().requires_grad_()],
        lambda h: bend_distance(h, reference, index, kind="mse", implementation=implementation),
        lambda h: bend_distance_reference(h, reference.double(), index, "mse"),
    )
    assert_matches(value, expected, tolerance=3e-6)
    assert_matches(grads[0], expected_grads[0], tolerance=3e-6)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_bend_distance_strided(implementation, device, layout) -> None:
    hidden = strided(spread((3, 4, 24), torch.float32, device, 3), layout)
    reference = strided(
        spread((3, 4, 24), torch.float32, device, 4), "sliced" if layout == "transposed" else "transposed"
    )
    value, grads, expected, expected_grads = both(
        lambda: [hidden.detach().requires_grad_()],
        lambda h: bend_distance(h, reference, kind="cosine", implementation=implementation),
        lambda h: bend_distance_reference(h, reference.double(), None, "cosine"),
    )
    assert_matches(value, expected, tolerance=3e-6)
    assert_matches(grads[0], expected_grads[0], tolerance=3e-6)


def layers(size, dtype, device, count=3, layout="contiguous"):
    hiddens = [strided(spread(size, dtype, device, 10 + i), layout) for i in range(count)]
    return hiddens, [spread(size, dtype, device, 20 + i) for i in range(count)]


def token_mask(size, device, which):
    if which == "none":
        return None
    mask = torch.zeros(size[:-1], dtype=torch.bool, device=device)
    if which == "ragged":
        mask[0, 1:] = True
        mask[1, :2] = True
    return mask


@DTYPES
@pytest.mark.parametrize("consume", [False, True], ids=["keep", "consume"])
@pytest.mark.parametrize(
    ("which", "reduction"), [("none", "sum"), ("ragged", "mean"), ("ragged", "sum"), ("empty", "mean")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_window_distance(implementation, device, kind, which, consume, reduction, dtype) -> None:
    size = (2, 5, 37)
    hiddens, references = layers(size, dtype, device)
    mask = token_mask(size, device, which)
    doubles = [r.double() for r in references]
    value, grads, expected, expected_grads = both(
        lambda: [h.detach().requires_grad_() for h in hiddens],
        lambda *hs: window_distance(
            hs,
            references,
            mask,
            kind=kind,
            reduction=reduction,
            consume_references=consume,
            implementation=implementation,
        ),
        lambda *hs: window_distance_reference(hs, doubles, mask, kind, reduction),
    )
    assert_matches(value, expected, tolerance=3e-6)
    for got, want in zip(grads, expected_grads):
        assert_matches(got, want, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("needed", [(True, False, True), (False, False, True), (False, False, False)], ids=str)
@pytest.mark.parametrize("consume", [False, True], ids=["keep", "consume"])
def test_window_distance_gradient_subsets(implementation, device, needed, consume) -> None:
    hiddens, references = layers((2, 3, 8), torch.float32, device)
    expected = window_distance_reference([h.double() for h in hiddens], [r.double() for r in references], None, "l2")
    leaves = [h.detach().requires_grad_(n) for h, n in zip(hiddens, needed)]
    doubles = [h.detach().double().requires_grad_(n) for h, n in zip(hiddens, needed)]
    expected = window_distance_reference(doubles, [r.double() for r in references], None, "l2")
    value = window_distance(leaves, references, None, consume_references=consume, implementation=implementation)
    assert_matches(value, expected, tolerance=3e-6)
    assert value.requires_grad == any(needed)
    if any(needed):
        value.backward()
        expected.backward()
    for leaf, double, wanted in zip(leaves, doubles, needed):
        assert (leaf.grad is not None) == wanted
        if wanted:
            assert_matches(leaf.grad, double.grad, tolerance=3e-6)


def test_masked_out_values_never_matter(implementation, device) -> None:
    hiddens, references = layers((2, 5, 8), torch.float32, device)
    mask = token_mask((2, 5, 8), device, "ragged")
    clean = window_distance(hiddens, references, mask, implementation=implementation)
    for tensor in (*hiddens, *references):
        tensor[~mask] = float("nan")
    leaves = [h.detach().requires_grad_() for h in hiddens]
    value = window_distance(leaves, references, mask, implementation=implementation)
    value.backward()
    assert torch.equal(value.detach(), clean)
    for leaf in leaves:
        assert torch.equal(leaf.grad[~mask], torch.zeros_like(leaf.grad[~mask]))
        assert torch.isfinite(leaf.grad).all()


def test_window_distance_strided_layers(implementation, device) -> None:
    hiddens, references = layers((3, 4, 24), torch.float32, device, layout="transposed")
    mask = token_mask((3, 4, 24), device, "ragged")
    expected = window_distance_reference([h.double() for h in hiddens], [r.double() for r in references], mask, "l2")
    assert_matches(window_distance(hiddens, references, mask, implementation=implementation), expected, tolerance=3e-6)


def test_consumed_references_refuse_a_second_backward(implementation, device) -> None:
    hiddens, references = layers((2, 3, 8), torch.float32, device)
    leaves = [h.requires_grad_() for h in hiddens]
    value = window_distance(leaves, references, None, consume_references=True, implementation=implementation)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_kept_references_allow_a_second_backward(implementation, device) -> None:
    hiddens, references = layers((2, 3, 8), torch.float32, device)
    kept = [r.clone() for r in references]
    leaves = [h.requires_grad_() for h in hiddens]
    value = window_distance(leaves, references, None, implementation=implementation)
    value.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    assert all(torch.equal(leaf.grad, 2 * g) for leaf, g in zip(leaves, first))
    assert all(torch.equal(a, b) for a, b in zip(references, kept))


def test_hand_worked_values(implementation, device) -> None:
    hidden = torch.tensor([[3.0, 4.0], [1.0, 0.0]], device=device)
    reference = torch.tensor([[0.0, 0.0], [0.0, 2.0]], device=device)
    values = {"l2": 5 + 5**0.5, "mse": 12.5 + 2.5, "cosine": 2.0, "relu_cosine": 0.0}
    for kind, expected in values.items():
        got = bend_distance(hidden, reference, kind=kind, reduction="sum", implementation=implementation)
        assert got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind) -> None:
    cpu = torch.device("cpu")
    hiddens, references = layers((2, 3, 5), torch.float64, cpu, count=2)
    mask = token_mask((2, 3, 5), cpu, "ragged")
    leaves = [h.requires_grad_() for h in hiddens]
    assert torch.autograd.gradcheck(
        lambda *hs: window_distance(hs, references, mask, kind=kind, implementation="torch"), leaves
    )
    assert torch.autograd.gradcheck(
        lambda h: bend_distance(h, references[0][0, :2], torch.tensor([4, 1]), kind=kind, implementation="torch"),
        leaves[:1],
    )
