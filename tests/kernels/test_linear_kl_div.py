"""``linear_kl_div`` against the full-logits oracle in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, assert_scale, spread, strided
from repbend_kernels import linear_kl_div
from repbend_kernels.oracles import linear_kl_div_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def head(rows, width, vocabulary, dtype, device, bias=False, apart=1.0):
    """Hidden states, references ``apart`` from them, a head, and a bias or None; logits of order 1."""
    hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = hidden + apart * torch.randn(
        rows, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    weight = (
        torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 / width**0.5
    )
    offset = torch.randn(vocabulary, generator=torch.Generator().manual_seed(4), dtype=torch.float64) if bias else None
    return [None if t is None else t.to(device=device, dtype=dtype) for t in (hidden, reference, weight, offset)]


def compare(hidden, reference, weight, *, tolerance, implementation, chunk_rows=None, **options):
    leaf = hidden.detach().requires_grad_()
    value = linear_kl_div(leaf, reference, weight, chunk_rows=chunk_rows, implementation=implementation, **options)
    (value * 0.3).backward()
    double = hidden.detach().double().requires_grad_()
    wide = {key: v.double() if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    expected = linear_kl_div_reference(double, reference.double(), weight.double(), **wide)
    (expected * 0.3).backward()
    assert value.dtype == torch.float32
    assert_matches(value, expected, tolerance=1e-5, name="loss")
    assert_matches(leaf.grad, double.grad, tolerance=tolerance, name="gradient")


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 5, 21])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_and_temperature(implementation, device, rows, temperature, dtype) -> None:
    hidden, reference, weight, _ = head(rows, 48, 300, dtype, device)
    compare(
        hidden,
        reference,
        weight,
        temperature=temperature,
        chunk_rows=8,
        tolerance=2 * TOLERANCE[dtype],
        implementation=implementation,
    )


@DTYPES
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 17, 64, 2048, 2049, 4097, 9001])
def test_vocabularies(implementation, device, vocabulary, softcap, dtype) -> None:
    """A 16-bit gradient is packed in blocks of 2048 words."""
    hidden, reference, weight, bias = head(3, 16, vocabulary, dtype, device, bias=True)
    tolerance = max(1e-5, 2 * TOLERANCE[dtype])
    compare(
        hidden,
        reference,
        weight,
        bias=bias,
        temperature=2.0,
        softcap=softcap,
        tolerance=tolerance,
        implementation=implementation,
    )


@DTYPES
@pytest.mark.parametrize("side", ["both", "teacher"])
def test_a_word_that_is_masked_out(implementation, device, side, dtype) -> None:
    hidden, reference, weight, bias = head(4, 16, 40, dtype, device, bias=True)
    masked = bias.clone()
    masked[[3, 17]] = -float("inf")
    heads = {"both": {"bias": masked}, "teacher": {"bias": bias, "reference_weight": weight, "reference_bias": masked}}[
        side
    ]
    compare(
        hidden,
        reference,
        weight,
        temperature=2.0,
        tolerance=2 * TOLERANCE[dtype],
        implementation=implementation,
        **heads,
    )


def test_a_word_that_only_the_teacher_has_is_infinitely_far(implementation, device) -> None:
    hidden, reference, weight, bias = head(4, 16, 40, torch.float32, device, bias=True)
    masked = bias.clone()
    masked[3] = -float("inf")
    leaf = hidden.requires_grad_()
    value = linear_kl_div(
        leaf,
        reference,
        weight,
        bias=masked,
        reference_weight=weight,
        reference_bias=bias,
        implementation=implementation,
    )
    value.backward()
    assert value.item() == float("inf")
    double = hidden.detach().double().requires_grad_()
    linear_kl_div_reference(
        double, reference.double(), weight.double(), masked.double(), weight.double(), bias.double()
    ).backward()
    assert_matches(leaf.grad, double.grad, tolerance=1e-5)


@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_selected_rows(implementation, device, count, reduction, dtype) -> None:
    hidden, _, weight, bias = head(9, 32, 90, dtype, device, bias=True)
    reference = head(count, 32, 90, dtype, device)[1]
    rows = torch.tensor([7, 0, 8, 3, 4], device=device)[:count]
    options = {"rows": rows, "bias": bias, "reduction": reduction}
    wide = {**options, "bias": bias.double()}
    leaf, double = hidden.detach().requires_grad_(), hidden.double().requires_grad_()
    value = linear_kl_div(leaf, reference, weight, chunk_rows=2, implementation=implementation, **options)
    expected = linear_kl_div_reference(double, reference.double(), weight.double(), **wide)
    (value * 0.3).backward()
    (expected * 0.3).backward()
    assert_matches(value, expected, tolerance=1e-5)
    assert_matches(leaf.grad, double.grad, tolerance=2 * TOLERANCE[dtype])
    others = [row for row in range(9) if row not in rows.tolist()]
    assert torch.equal(leaf.grad[others], torch.zeros(9 - count, 32, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 1e-4), (torch.bfloat16, 6e-4)],
    ids=["fp32", "fp16", "bf16"],
)
def test_a_factor_is_not_rounded_to_sixteen_bits(implementation, device, dtype, tolerance) -> None:
    """A third in bfloat16 is 2e-3 off, in float16 2.4e-4."""
    hidden, reference, weight, _ = head(64, 32, 90, dtype, device)
    grads = []
    for factor in (1.0, 1 / 3):
        leaf = hidden.detach().requires_grad_()
        (linear_kl_div(leaf, reference, weight, implementation=implementation) * factor).backward()
        grads.append(leaf.grad)
    assert_matches(grads[1], grads[0].double() / 3, tolerance=TOLERANCE[dtype])
    assert_scale(grads[1], grads[0].double() / 3, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_softcap_and_bias(implementation, device, dtype, reduction) -> None:
    hidden, reference, weight, bias = head(7, 32, 200, dtype, device, bias=True)
    compare(
        hidden,
        reference,
        weight,
        bias=bias,
        softcap=3.0,
        reduction=reduction,
        temperature=2.0,
        tolerance=2 * TOLERANCE[dtype],
        implementation=implementation,
    )


@pytest.mark.parametrize("reference_bias", [False, True])
def test_separate_heads(implementation, device, reference_bias) -> None:
    hidden, _, weight, bias = head(7, 32, 200, torch.float32, device, bias=True)
    reference, _, reference_weight, offset = head(7, 24, 200, torch.float32, device, bias=reference_bias)
    compare(
        hidden,
        reference,
        weight,
        bias=bias,
        reference_weight=reference_weight,
        reference_bias=offset,
        tolerance=1e-5,
        implementation=implementation,
    )


@DTYPES
@pytest.mark.parametrize("apart", [1e-1, 1e-2])
def test_close_distributions_keep_their_gradient(implementation, device, dtype, apart) -> None:
    """What K is for: 16-bit logits would lose 4 to 23 % here; float32 logits bound what is left."""
    hidden, reference, weight, _ = head(6, 64, 500, dtype, device, apart=apart)
    compare(
        hidden,
        reference,
        weight,
        temperature=2.0,
        tolerance=2 * max(TOLERANCE[dtype], 5e-5),
        implementation=implementation,
    )


def test_equal_states_give_exactly_zero(implementation, device) -> None:
    hidden, _, weight, _ = head(5, 32, 100, torch.bfloat16, device)
    leaf = hidden.detach().requires_grad_()
    value = linear_kl_div(leaf, hidden, weight, temperature=2.0, implementation=implementation)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(leaf.grad, torch.zeros_like(hidden))


def test_never_negative(implementation, device) -> None:
    hidden, reference, weight, _ = head(16, 32, 700, torch.float32, device, apart=1e-5)
    for row in range(16):
        assert (
            linear_kl_div(hidden[row : row + 1], reference[row : row + 1], weight, implementation=implementation).item()
            >= 0
        )


def test_large_logits_stay_finite(implementation, device) -> None:
    hidden, reference, weight, _ = head(5, 32, 100, torch.float32, device)
    compare(hidden * 300, reference * 300, weight, tolerance=1e-4, implementation=implementation)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strided_hidden_and_weight(implementation, device, layout) -> None:
    hidden, reference, weight, _ = head(7, 32, 90, torch.float32, device)
    compare(
        strided(hidden, layout),
        strided(reference, layout),
        strided(weight, layout),
        tolerance=1e-5,
        implementation=implementation,
    )


def test_chunks_change_nothing(implementation, device) -> None:
    hidden, reference, weight, _ = head(20, 32, 90, torch.float32, device)
    grads = []
    for chunk in (1, 7, 20, 100):
        leaf = hidden.detach().requires_grad_()
        linear_kl_div(leaf, reference, weight, chunk_rows=chunk, implementation=implementation).backward()
        grads.append(leaf.grad)
    for grad in grads[1:]:
        assert_matches(grad, grads[0], tolerance=1e-6)


def test_backward_twice_accumulates(implementation, device) -> None:
    hidden, reference, weight, _ = head(4, 32, 90, torch.float32, device)
    leaf = hidden.requires_grad_()
    value = linear_kl_div(leaf, reference, weight, implementation=implementation)
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    value.backward()
    assert torch.equal(leaf.grad, 2 * first)


def test_float16_keeps_a_gradient_that_float16_cannot_hold(implementation, device) -> None:
    """A mean over many rows scales the gradient far below float16's range until a loss scaler lifts it again."""
    hidden, reference, weight, _ = head(4, 32, 90, torch.float16, device, apart=1e-2)
    leaf = hidden.detach().requires_grad_()
    (linear_kl_div(leaf, reference, weight, implementation=implementation) * 2.0**-24 * 2.0**24).backward()
    double = hidden.double().requires_grad_()
    linear_kl_div_reference(double, reference.double(), weight.double()).backward()
    assert_matches(leaf.grad, double.grad, tolerance=5e-3)


def test_value_without_gradient(implementation, device) -> None:
    hidden, reference, weight, _ = head(4, 32, 90, torch.float32, device)
    with torch.no_grad():
        value = linear_kl_div(hidden.requires_grad_(), reference, weight, implementation=implementation)
    assert not value.requires_grad
    assert_matches(
        value, linear_kl_div_reference(hidden.detach().double(), reference.double(), weight.double()), tolerance=1e-5
    )


def test_gradcheck() -> None:
    hidden, reference, weight, bias = head(4, 6, 9, torch.float64, torch.device("cpu"), bias=True)
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, cap=softcap: linear_kl_div(
                h, reference, weight, bias=bias, temperature=2.0, softcap=cap, chunk_rows=3, implementation="torch"
            ),
            hidden.requires_grad_(),
        )


def test_spread_rows(implementation, device) -> None:
    """Rows whose states differ in scale by a hundred: the small rows' gradient is compared alone."""
    hidden, reference = spread((8, 32), torch.float32, device, 1), spread((8, 32), torch.float32, device, 2)
    weight = spread((120, 32), torch.float32, device, 3) / 8
    compare(hidden, reference, weight, tolerance=2e-5, implementation=implementation)
