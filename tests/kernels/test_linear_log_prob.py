"""``linear_log_prob`` against the full-logits oracle in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, spread, strided
from repbend_kernels import linear_log_prob
from repbend_kernels.oracles import linear_log_prob_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def head(rows, width, vocabulary, dtype, device, bias=False):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * 2 / width**0.5
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(device, dtype) if bias else None
    return hidden.to(device, dtype), weight.to(device, dtype), targets, offset


def compare(hidden, weight, targets, *, tolerance, implementation, chunk_rows=None, **options):
    factor = spread((hidden.shape[0],), torch.float32, hidden.device, 9)
    leaf = hidden.detach().requires_grad_()
    value = linear_log_prob(leaf, weight, targets, chunk_rows=chunk_rows, implementation=implementation, **options)
    (value * factor).sum().backward()
    double = hidden.detach().double().requires_grad_()
    wide = {key: v.double() if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    expected = linear_log_prob_reference(double, weight.double(), targets, **wide)
    (expected * factor).sum().backward()
    assert value.dtype == torch.float32
    assert_matches(value, expected, tolerance=3e-6, name="value")
    assert_matches(leaf.grad, double.grad, tolerance=tolerance, name="gradient")


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 5, 21])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_and_temperature(implementation, device, rows, temperature, dtype) -> None:
    hidden, weight, targets, _ = head(rows, 48, 300, dtype, device)
    compare(
        hidden,
        weight,
        targets,
        temperature=temperature,
        chunk_rows=8,
        tolerance=2 * TOLERANCE[dtype],
        implementation=implementation,
    )


@DTYPES
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [2, 17, 64, 2048, 2049, 4097, 9001])
def test_vocabularies(implementation, device, vocabulary, softcap, dtype) -> None:
    """A 16-bit gradient is packed in blocks of 4096 words."""
    hidden, weight, targets, bias = head(3, 16, vocabulary, dtype, device, bias=True)
    targets[0] = vocabulary - 1
    tolerance = max(1e-5, 2 * TOLERANCE[dtype])
    compare(hidden, weight, targets, bias=bias, softcap=softcap, tolerance=tolerance, implementation=implementation)


@DTYPES
def test_a_word_that_is_masked_out(implementation, device, dtype) -> None:
    hidden, weight, targets, bias = head(4, 16, 40, dtype, device, bias=True)
    targets[:] = torch.tensor([5, 6, 7, 8], device=device)
    bias[[3, 17]] = -float("inf")
    compare(hidden, weight, targets, bias=bias, tolerance=2 * TOLERANCE[dtype], implementation=implementation)


def test_a_target_that_is_masked_out_is_never_said(implementation, device) -> None:
    hidden, weight, targets, bias = head(4, 16, 40, torch.float32, device, bias=True)
    bias[targets[1]] = -float("inf")
    never = targets == targets[1]
    leaf, double = hidden.detach().requires_grad_(), hidden.double().requires_grad_()
    value = linear_log_prob(leaf, weight, targets, bias=bias, implementation=implementation)
    value.sum().backward()
    linear_log_prob_reference(double, weight.double(), targets, bias.double()).sum().backward()
    assert torch.equal(value == -float("inf"), never)
    assert_matches(leaf.grad, double.grad, tolerance=1e-5)


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 5])
def test_selected_rows_and_ignored_targets(implementation, device, count, dtype) -> None:
    hidden, weight, targets, bias = head(9, 32, 90, dtype, device, bias=True)
    rows, targets = torch.tensor([7, 0, 8, 3, 4], device=device)[:count], targets[:count]
    targets[2:3] = -100
    hidden[8] = float("nan")  # read by the ignored target alone
    clean = torch.where(hidden.isnan(), 0.0, hidden)
    lengths = [2, 3] if count == 5 else [count]
    leaf, double = hidden.detach().requires_grad_(), clean.double().requires_grad_()
    value = linear_log_prob(
        leaf, weight, targets, rows=rows, bias=bias, lengths=lengths, chunk_rows=2, implementation=implementation
    )
    picked = linear_log_prob_reference(double, weight.double(), targets, bias.double(), rows=rows, ignore_index=-100)
    expected = torch.stack([part.sum() for part in picked.split(lengths)])
    factor = torch.tensor([0.3, -2.0], device=device)[: len(lengths)]
    (value * factor).sum().backward()
    (expected * factor).sum().backward()
    assert_matches(value, expected, tolerance=3e-6)
    assert_matches(leaf.grad, double.grad, tolerance=2 * TOLERANCE[dtype])
    untouched = [row for row in range(9) if row not in rows.tolist() or (row == 8)]
    assert torch.equal(leaf.grad[untouched], torch.zeros(len(untouched), 32, dtype=dtype, device=device))


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_labels_as_they_come(implementation, device, ignore_index) -> None:
    hidden, weight, targets, _ = head(6, 32, 90, torch.float32, device)
    targets[[0, 4]] = ignore_index
    leaf = hidden.detach().requires_grad_()
    value = linear_log_prob(leaf, weight, targets, ignore_index=ignore_index, implementation=implementation)
    value.sum().backward()
    assert torch.equal(value[[0, 4]].detach(), torch.zeros(2, device=device))
    assert torch.equal(leaf.grad[[0, 4]], torch.zeros(2, 32, device=device))
    counted = linear_log_prob(hidden, weight, targets[[1, 2, 3, 5]], rows=torch.tensor([1, 2, 3, 5], device=device))
    assert_matches(value[[1, 2, 3, 5]], counted, tolerance=3e-6)


def test_a_row_that_is_named_twice_gets_both_gradients(implementation, device) -> None:
    hidden, weight, targets, _ = head(4, 32, 90, torch.float32, device)
    rows = torch.tensor([2, 0, 2], device=device)
    grads = []
    for states, selection in ((hidden, rows), (hidden[rows], None)):
        leaf = states.detach().requires_grad_()
        linear_log_prob(leaf, weight, targets[:3], rows=selection, implementation=implementation).sum().backward()
        grads.append(leaf.grad)
    expected = torch.zeros_like(hidden).index_add(0, rows, grads[1])
    assert_matches(grads[0], expected, tolerance=3e-6)


@DTYPES
def test_softcap_and_bias(implementation, device, dtype) -> None:
    hidden, weight, targets, bias = head(7, 32, 200, dtype, device, bias=True)
    compare(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=3.0,
        temperature=2.0,
        tolerance=2 * TOLERANCE[dtype],
        implementation=implementation,
    )


def test_a_single_word_is_certain(implementation, device) -> None:
    hidden, weight, targets, _ = head(3, 16, 1, torch.float32, device)
    leaf = hidden.requires_grad_()
    value = linear_log_prob(leaf, weight, targets, implementation=implementation)
    value.sum().backward()
    assert torch.equal(value.detach(), torch.zeros(3, device=device))
    assert leaf.grad.abs().max() < 1e-6


def test_large_logits_stay_finite(implementation, device) -> None:
    hidden, weight, targets, _ = head(5, 32, 100, torch.float32, device)
    compare(hidden * 300, weight, targets, tolerance=1e-4, implementation=implementation)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strided_hidden_and_weight(implementation, device, layout) -> None:
    hidden, weight, targets, _ = head(7, 32, 90, torch.float32, device)
    compare(strided(hidden, layout), strided(weight, layout), targets, tolerance=1e-5, implementation=implementation)


def test_sums_per_sequence(implementation, device) -> None:
    hidden, weight, targets, _ = head(9, 32, 90, torch.float32, device)
    per_token = linear_log_prob(hidden, weight, targets, implementation=implementation)
    leaf = hidden.requires_grad_()
    lengths = [4, 0, 1, 4]
    sums = linear_log_prob(leaf, weight, targets, lengths=lengths, implementation=implementation)
    for total, part in zip(sums, per_token.split(lengths)):
        assert_matches(total, part.double().sum(), tolerance=1e-6)
    sums[2].backward()
    assert leaf.grad[4].abs().max() > 0
    assert torch.equal(leaf.grad[[0, 1, 2, 3, 5, 6, 7, 8]], torch.zeros(8, 32, device=device))


def test_no_sequences(implementation, device) -> None:
    hidden, weight, targets, _ = head(0, 32, 90, torch.float32, device)
    assert linear_log_prob(hidden, weight, targets, lengths=[], implementation=implementation).shape == (0,)


def test_value_without_gradient(implementation, device) -> None:
    hidden, weight, targets, _ = head(4, 32, 90, torch.float32, device)
    with torch.no_grad():
        value = linear_log_prob(hidden.requires_grad_(), weight, targets, implementation=implementation)
    assert not value.requires_grad
    assert_matches(value, linear_log_prob_reference(hidden.detach().double(), weight.double(), targets), tolerance=3e-6)


def test_gradcheck() -> None:
    hidden, weight, targets, bias = head(4, 6, 9, torch.float64, torch.device("cpu"), bias=True)
    for softcap in (None, 3.0):
        assert torch.autograd.gradcheck(
            lambda h, cap=softcap: linear_log_prob(
                h,
                weight,
                targets,
                bias=bias,
                temperature=2.0,
                softcap=cap,
                chunk_rows=3,
                lengths=[3, 1],
                implementation="torch",
            ),
            hidden.requires_grad_(),
        )
