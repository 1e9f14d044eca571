"""Every wrong argument is an error at the Python surface that names the argument and what was expected."""

from __future__ import annotations

import pytest
import torch
from repbend_kernels import (
    bend_distance,
    bend_tap,
    gated_product,
    linear_kl_div,
    linear_log_prob,
    lora_down,
    lora_up,
    pairwise_cosine,
    rms_norm,
    set_debug,
    tap_rows,
    triplet_sums,
    triplet_tap,
    window_distance,
)

H = torch.zeros(2, 3, 8)
META = torch.zeros(2, 3, 8, device="meta")
R = torch.zeros(2, 8)
ROWS = torch.tensor([1, 4])
FLAT, WEIGHT, TARGETS = torch.zeros(5, 8), torch.zeros(11, 8), torch.zeros(5, dtype=torch.int64)
GRAD = torch.zeros(2, 8, requires_grad=True)


def kl(hidden=FLAT, reference=FLAT, weight=WEIGHT, **options):
    return linear_kl_div(hidden, reference, weight, **options)


def log_prob(hidden=FLAT, weight=WEIGHT, targets=TARGETS, **options):
    return linear_log_prob(hidden, weight, targets, **options)


def triplets(hidden=H, reference=R, rows=(ROWS[:1], ROWS[1:]), **options):
    return triplet_tap(hidden, reference, rows, weights=(1.0, 1.0), margins=(2.0, 2.0), **options)


CASES = {
    "triplets reference rows": (
        lambda: triplets(reference=R[:1]),
        ValueError,
        r"reference: expected shape \[2, 8\] .*got \[1, 8\]",
    ),
    "triplets reference dtype": (
        lambda: triplets(reference=R.half()),
        TypeError,
        r"reference: expected torch.float32 as hidden has",
    ),
    "triplets reference with gradient": (
        lambda: triplets(reference=GRAD),
        ValueError,
        r"reference: expected a tensor that requires no",
    ),
    "triplets rows": (
        lambda: triplets(rows=(ROWS[:1], ROWS[1:].int())),
        TypeError,
        r"rows\[1\]: expected an int64 tensor",
    ),
    "triplets unit": (lambda: triplets(unit=0.0), ValueError, r"unit: expected a finite number > 0, got 0.0"),
    "triplet sums without references": (
        lambda: triplet_sums(H, (ROWS[:1], ROWS[1:]), reference=R),
        ValueError,
        r"known: expected together with reference",
    ),
    "norm weight": (
        lambda: rms_norm(H, R[0, :7], 1e-5),
        ValueError,
        r"weight: expected shape \[8\] \(width of x\), got \[7\]",
    ),
    "norm weight with gradient": (
        lambda: rms_norm(H, GRAD[0], 1e-5),
        ValueError,
        r"weight: expected a tensor that requires no gradient",
    ),
    "norm integers": (lambda: rms_norm(H.long(), R[0], 1e-5), TypeError, r"x: expected float32.*got torch.int64"),
    "gate shape": (
        lambda: gated_product(H, H[:1], "silu"),
        ValueError,
        r"up: expected shape \[2, 3, 8\] \(as gate\), got \[1, 3, 8\]",
    ),
    "gate dtype": (
        lambda: gated_product(H, H.half(), "silu"),
        TypeError,
        r"up: expected torch.float32 as gate has, got torch.float16",
    ),
    "gate activation": (
        lambda: gated_product(H, H, "relu"),
        ValueError,
        r"activation: expected one of silu, gelu_tanh, got 'relu'",
    ),
    "lora rows": (lambda: lora_down(H, R), ValueError, r"x: expected shape \[N, D\], got \[2, 3, 8\]"),
    "lora matrices": (lambda: lora_down(FLAT, [R] * 4), ValueError, r"a: expected one to 3 matrices, got 4"),
    "lora dtypes": (lambda: lora_down(FLAT, [R, R.double()]), TypeError, r"a\[1\]: expected a\[0\]'s dtype"),
    "lora widths": (lambda: lora_down(FLAT, [R, R[:, :7]]), ValueError, r"a\[1\]: expected shape \[r, 8\]"),
    "lora width": (lambda: lora_down(FLAT, R[:, :7]), ValueError, r"a: expected shape \[r, 8\], got \[2, 7\]"),
    "lora keys not hashed": (
        lambda: lora_down(FLAT, R, TARGETS, 0, 0.5),
        TypeError,
        r"hashes: expected an int32 tensor, got torch.int64",
    ),
    "lora number of keys": (
        lambda: lora_down(FLAT, R, TARGETS[:4].int(), 0, 0.5),
        ValueError,
        r"hashes: expected shape \[5\]",
    ),
    "lora probability": (
        lambda: lora_down(FLAT, R, TARGETS.int(), 0, 1.0),
        ValueError,
        r"p: expected 0 < p < 1 with hashes, got 1.0",
    ),
    "lora result": (
        lambda: lora_up(FLAT, FLAT[:4, :2], R.T, 1.0),
        ValueError,
        r"down: expected shape \[5, r\], got \[4, 2\]",
    ),
    "lora weight": (
        lambda: lora_up(FLAT, FLAT[:, :2], R, 1.0),
        ValueError,
        r"b: expected shape \[8, 2\], got \[2, 8\]",
    ),
    "lora down in 16 bits": (
        lambda: lora_up(FLAT, FLAT[:, :2].half(), R.T, 1.0),
        TypeError,
        r"down: expected torch.float32 beside",
    ),
    "tap unknown kind": (
        lambda: bend_tap(H, R, ROWS, kind="l1"),
        ValueError,
        r"kind: expected one of l2, cosine.*got 'l1'",
    ),
    "tap hidden of one dimension": (
        lambda: bend_tap(R[0], R, ROWS),
        ValueError,
        r"hidden: expected shape \[\.\.\., D\].*got \[8\]",
    ),
    "tap hidden of integers": (
        lambda: bend_tap(H.long(), R, ROWS),
        TypeError,
        r"hidden: expected float32.*got torch.int64",
    ),
    "tap no tensor": (lambda: bend_tap([1.0], R, ROWS), TypeError, r"hidden: expected a tensor, got list"),
    "tap rows of floats": (
        lambda: bend_tap(H, R, ROWS.float()),
        TypeError,
        r"rows: expected an int64 tensor of shape \[R\]",
    ),
    "tap rows of two dimensions": (
        lambda: bend_tap(H, R, ROWS[None]),
        TypeError,
        r"rows: expected an int64 tensor.*\[1, 2\]",
    ),
    "tap rows as a list": (lambda: bend_tap(H, R, [1, 4]), TypeError, r"rows: expected an int64 tensor.*got list"),
    "tap reference width": (
        lambda: bend_tap(H, R[:, :7], ROWS),
        ValueError,
        r"reference_rows: expected shape \[2, 8\].*\[2, 7\]",
    ),
    "tap reference rows": (
        lambda: bend_tap(H, torch.zeros(3, 8), ROWS),
        ValueError,
        r"reference_rows: expected shape \[2, 8\].*\[3, 8\]",
    ),
    "tap reference dtype": (
        lambda: bend_tap(H, R.half(), ROWS),
        TypeError,
        r"reference_rows: expected torch.float32 as hidden has, got torch.float16",
    ),
    "tap reference device": (
        lambda: bend_tap(H, META[0, :2], ROWS),
        ValueError,
        r"reference_rows: expected device cpu as hidden has, got meta",
    ),
    "tap rows device": (
        lambda: bend_tap(H, R, ROWS.to("meta")),
        ValueError,
        r"rows: expected device cpu as hidden has, got meta",
    ),
    "tap reference with gradient": (
        lambda: bend_tap(H, GRAD, ROWS),
        ValueError,
        r"reference_rows: expected a tensor that requires no gradient",
    ),
    "tap reference strided": (
        lambda: bend_tap(H, torch.zeros(8, 2).T, ROWS),
        ValueError,
        r"reference_rows: expected a contiguous tensor",
    ),
    "tap_rows rows": (lambda: tap_rows(H, ROWS.int()), TypeError, r"rows: expected an int64 tensor"),
    "distance shape": (
        lambda: bend_distance(H, H[:1]),
        ValueError,
        r"reference: expected shape \[2, 3, 8\].*got \[1, 3, 8\]",
    ),
    "distance shape with rows": (
        lambda: bend_distance(H, H, ROWS),
        ValueError,
        r"reference: expected shape \[2, 8\] \(one row per index",
    ),
    "distance reduction": (
        lambda: bend_distance(H, H, reduction="none"),
        ValueError,
        r"reduction: expected one of mean, sum, got 'none'",
    ),
    "distance reference with gradient": (
        lambda: bend_distance(GRAD, GRAD),
        ValueError,
        r"reference: expected a tensor that requires no",
    ),
    "window no layers": (lambda: window_distance([], [], None), ValueError, r"hiddens: expected at least one layer"),
    "window counts": (
        lambda: window_distance([H, H], [H], None),
        ValueError,
        r"references: expected 2 layers as hiddens has, got 1",
    ),
    "window layer shape": (
        lambda: window_distance([H, H[:1]], [H, H], None),
        ValueError,
        r"hiddens\[1\]: expected shape \[2, 3, 8\]",
    ),
    "window reference shape": (
        lambda: window_distance([H, H], [H, H[:1]], None),
        ValueError,
        r"references\[1\]: expected shape \[2, 3, 8\]",
    ),
    "window dtype": (
        lambda: window_distance([H, H], [H, H.half()], None),
        TypeError,
        r"references\[1\]: expected torch.float32",
    ),
    "window device": (lambda: window_distance([H], [META], None), ValueError, r"references\[0\]: expected device cpu"),
    "window mask dtype": (
        lambda: window_distance([H], [H], torch.ones(2, 3)),
        TypeError,
        r"mask: expected a bool tensor, got torch.float32",
    ),
    "window mask shape": (
        lambda: window_distance([H], [H], torch.ones(3, 2).bool()),
        ValueError,
        r"mask: expected shape \[2, 3\]",
    ),
    "window kind": (lambda: window_distance([H], [H], None, kind="kl"), ValueError, r"kind: expected one of"),
    "window reference with gradient": (
        lambda: window_distance([GRAD], [GRAD], None),
        ValueError,
        r"references\[0\]: expected a tensor that",
    ),
    "window consumes strided": (
        lambda: window_distance([GRAD], [torch.zeros(8, 2).T], None, consume_references=True),
        ValueError,
        r"references\[0\]: expected a contiguous tensor to consume",
    ),
    "pairs dimensions": (
        lambda: pairwise_cosine(R),
        ValueError,
        r"states: expected shape \[layers, B, D\], got \[2, 8\]",
    ),
    "pairs one sequence": (
        lambda: pairwise_cosine(H[:, :1]),
        ValueError,
        r"states: expected at least two sequences to form pairs, got 1",
    ),
    "pairs no layers": (lambda: pairwise_cosine([]), ValueError, r"states: expected at least one layer"),
    "pairs ragged": (lambda: pairwise_cosine([R, R[:1]]), ValueError, r"states\[1\]: expected shape \[2, 8\]"),
    "pairs dtype": (lambda: pairwise_cosine([R, R.half()]), TypeError, r"states\[1\]: expected torch.float32"),
    "kl hidden": (lambda: kl(hidden=H), ValueError, r"hidden: expected shape \[N, H\], got \[2, 3, 8\]"),
    "kl reference": (lambda: kl(reference=FLAT[:4]), ValueError, r"reference: expected shape \[5, 8\]"),
    "kl weight width": (
        lambda: kl(weight=torch.zeros(11, 7)),
        ValueError,
        r"weight: expected shape \[V, 8\].*got \[11, 7\]",
    ),
    "kl weight dtype": (lambda: kl(weight=WEIGHT.half()), TypeError, r"weight: expected torch.float32 as hidden has"),
    "kl weight device": (lambda: kl(weight=WEIGHT.to("meta")), ValueError, r"weight: expected device cpu"),
    "kl weight with gradient": (
        lambda: kl(weight=WEIGHT.clone().requires_grad_()),
        ValueError,
        r"weight: expected a tensor that requires no",
    ),
    "kl bias shape": (
        lambda: kl(bias=torch.zeros(10)),
        ValueError,
        r"bias: expected shape \[11\] \(vocabulary\), got \[10\]",
    ),
    "kl bias with gradient": (
        lambda: kl(bias=torch.zeros(11, requires_grad=True)),
        ValueError,
        r"bias: expected a tensor that requires no",
    ),
    "kl reference with gradient": (
        lambda: kl(reference=FLAT.clone().requires_grad_()),
        ValueError,
        r"reference: expected a tensor that",
    ),
    "kl reference bias alone": (
        lambda: kl(reference_bias=torch.zeros(11)),
        ValueError,
        r"reference_bias: expected None without reference_weight",
    ),
    "kl reference weight": (
        lambda: kl(reference_weight=torch.zeros(10, 8)),
        ValueError,
        r"reference_weight: expected shape \[11, 8\]",
    ),
    "kl reference weight with gradient": (
        lambda: kl(reference_weight=WEIGHT.clone().requires_grad_()),
        ValueError,
        r"reference_weight: expected a tensor that requires no gradient",
    ),
    "kl rows": (lambda: kl(rows=ROWS), ValueError, r"reference: expected shape \[2, 8\] \(one row per index in rows"),
    "kl rows dtype": (lambda: kl(rows=ROWS.int()), TypeError, r"rows: expected an int64 tensor"),
    "log-prob rows": (
        lambda: log_prob(rows=ROWS),
        ValueError,
        r"targets: expected shape \[2\] \(one target per index in rows\), got \[5\]",
    ),
    "kl softcap": (lambda: kl(softcap=0.0), ValueError, r"softcap: expected a finite number > 0, got 0.0"),
    "kl temperature": (lambda: kl(temperature=-1.0), ValueError, r"temperature: expected a finite number > 0"),
    "kl nan temperature": (
        lambda: kl(temperature=float("nan")),
        ValueError,
        r"temperature: expected a finite number > 0",
    ),
    "kl chunk": (lambda: kl(chunk_rows=0), ValueError, r"chunk_rows: expected at least 1, got 0"),
    "kl reduction": (lambda: kl(reduction="batchmean"), ValueError, r"reduction: expected one of mean, sum"),
    "log-prob targets count": (
        lambda: log_prob(targets=TARGETS[:4]),
        ValueError,
        r"targets: expected shape \[5\] \(rows of hidden\), got \[4\]",
    ),
    "log-prob targets dtype": (
        lambda: log_prob(targets=TARGETS.int()),
        TypeError,
        r"targets: expected an int64 tensor",
    ),
    "log-prob lengths": (
        lambda: log_prob(lengths=[2, 2]),
        ValueError,
        r"lengths: expected non-negative row counts that sum to 5",
    ),
    "log-prob negative length": (lambda: log_prob(lengths=[6, -1]), ValueError, r"lengths: expected non-negative"),
    "log-prob softcap": (lambda: log_prob(softcap=float("inf")), ValueError, r"softcap: expected a finite number > 0"),
    "log-prob weight with gradient": (
        lambda: log_prob(weight=WEIGHT.clone().requires_grad_()),
        ValueError,
        r"weight: expected a tensor that",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_named_before_any_work(case) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


DEBUG = {
    "tap too large": (
        lambda: bend_tap(H, R, torch.tensor([1, 6])),
        IndexError,
        r"rows: expected indices in 0 … 5, got 1 … 6",
    ),
    "tap negative": (
        lambda: bend_tap(H, R, torch.tensor([-1, 2])),
        IndexError,
        r"rows: expected indices in 0 … 5, got -1 … 2",
    ),
    "tap repeated": (lambda: bend_tap(H, R, torch.tensor([2, 2])), ValueError, r"rows: expected unique indices"),
    "tap_rows": (lambda: tap_rows(H, torch.tensor([9])), IndexError, r"rows: expected indices in 0 … 5"),
    "distance": (lambda: bend_distance(H, R, torch.tensor([0, 77])), IndexError, r"rows: expected indices in 0 … 5"),
    "kl repeated rows": (lambda: kl(rows=ROWS * 0, reference=FLAT[:2]), ValueError, r"rows: expected unique indices"),
    "log-prob rows": (
        lambda: log_prob(rows=ROWS + 1, targets=TARGETS[:2]),
        IndexError,
        r"rows: expected indices in 0 … 4, got 2 … 5",
    ),
    "targets beside ignored ones": (
        lambda: log_prob(targets=torch.tensor([-100, 1, -1, 2, 3])),
        IndexError,
        r"targets: expected indices in 0 … 10, got -1 … 3",
    ),
    "targets not ignored": (
        lambda: log_prob(targets=TARGETS - 100, ignore_index=None),
        IndexError,
        r"targets: expected indices in 0 … 10",
    ),
    "targets": (
        lambda: log_prob(targets=TARGETS + 11),
        IndexError,
        r"targets: expected indices in 0 … 10, got 11 … 11",
    ),
}


class DTensor(torch.Tensor):
    """Stands for torch.distributed's, which the package knows by its name."""


@pytest.mark.parametrize("call", [lambda t: bend_tap(t, R, ROWS), lambda t: kl(weight=t), lambda t: pairwise_cosine(t)])
def test_a_dtensor_is_sent_back_with_what_to_pass(call) -> None:
    with pytest.raises(TypeError, match=r"expected a plain tensor, got a DTensor; pass .to_local\(\).*full_tensor\(\)"):
        call(H.as_subclass(DTensor))


def test_debug_mode_lets_ignored_targets_pass() -> None:
    set_debug(True)
    try:
        assert log_prob(targets=TARGETS - 100).tolist() == [0.0] * 5
    finally:
        set_debug(False)


@pytest.mark.parametrize("case", DEBUG.values(), ids=DEBUG.keys())
def test_debug_mode_reads_the_indices(case) -> None:
    call, error, message = case
    set_debug(True)
    try:
        with pytest.raises(error, match=message):
            call()
    finally:
        set_debug(False)


def test_out_of_range_rows_are_no_silent_value_without_debug_mode(implementation, device) -> None:
    hidden, reference, rows = H.clone().to(device).requires_grad_(), R.to(device), torch.tensor([1, 6], device=device)
    if implementation == "torch" and device.type == "cpu":
        with pytest.raises(IndexError):
            bend_tap(hidden, reference.clone(), rows, implementation=implementation)
    elif implementation == "triton":
        assert bend_tap(hidden, reference.clone(), rows, implementation=implementation)[1].isnan()
        value = linear_log_prob(
            FLAT.to(device), WEIGHT.to(device), TARGETS.to(device) + 11, implementation=implementation
        )
        assert value.isnan().all()
