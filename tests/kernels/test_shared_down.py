"""``lora_down`` for layers that read one x: one mask, one launch, and each layer's numbers as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, relative_l2, spread, strided
from repbend_kernels import keyed_dropout, lora_down, lora_up, low_rank, low_rank_chunks, low_rank_sizes
from repbend_kernels.blocks import row_hashes
from test_low_rank import stub_kernels
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PLACE, P, SCALING, ROWS, INNER = 3, 0.5, 1.7, 37, 75
EXACT = 2e-6
OUTER = (70, 24, 33)
# Ranks of the layers, dtypes of activations and adapter; above 32 ranks in all A is read a few ranks at a time.
CASES = {
    "two, r 5 and 2": ((5, 2), BF16, FP32),
    "two, r 16, bf16": ((16, 16), BF16, BF16),
    "three, r 1, 7 and 3": ((1, 7, 3), FP32, FP32),
    "three, r 16": ((16, 16, 16), BF16, FP32),
    "three, r 20, 33 and 6": ((20, 33, 6), FP32, FP32),
    "three, r 8, fp16": ((8, 8, 8), FP16, FP32),
}
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def many_parts(monkeypatch) -> None:
    """Sums in several parts, chunks and spans, the last ones short."""
    monkeypatch.setattr(low_rank_sizes, "LEAST_SLAB", 16)
    monkeypatch.setattr(low_rank_sizes, "LEAST_SPAN", 40)
    monkeypatch.setattr(low_rank_chunks, "CHUNK_ELEMENTS", {"cpu": 1000, "other": 1000})
    monkeypatch.setattr(low_rank_chunks, "LEAST_ROWS", 1)


def leaves(case: str, device: torch.device) -> Leaves:
    ranks, dtype, adapter = CASES[case]
    of = {"x": spread((ROWS, INNER), dtype, device, 1)}
    for i, (rank, outer) in enumerate(zip(ranks, OUTER)):
        of |= {
            f"a{i}": spread((rank, INNER), adapter, device, 10 + i),
            f"b{i}": spread((outer, rank), adapter, device, 20 + i),
            f"w{i}": spread((outer, INNER), dtype, device, 30 + i) / 8,
            f"grad{i}": spread((ROWS, outer), dtype, device, 40 + i),
        }
    return of


def in_float64(of: Leaves) -> Leaves:
    return {name: leaf.double() for name, leaf in of.items()}


def hashes_on(device: torch.device) -> Tensor:
    return row_hashes(torch.arange(ROWS, device=device) * 31)


def adapted(of: Leaves, implementation: str, frozen: tuple[str, ...] = (), apart: bool = False) -> Leaves:
    """Outputs of all layers, and the gradients of x, every A and every B that is not ``frozen``."""
    numbers = range(sum(name.startswith("w") for name in of))
    given = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in of.items() if name[0] in "xab"}
    hashes, source = hashes_on(of["x"].device), given["x"] * 1
    options = {"implementation": implementation}
    if apart:
        read = [lora_down(source, given[f"a{i}"], hashes, PLACE, P, **options) for i in numbers]
    else:
        x, downs = lora_down(source, [given[f"a{i}"] for i in numbers], hashes, PLACE, P, **options)
        read = [(x, down) for down in downs]
    found = {}
    for i, (x, down) in enumerate(read):
        found[f"y{i}"] = lora_up(x @ of[f"w{i}"].T, down, given[f"b{i}"], SCALING / (1 - P), **options)
    torch.autograd.backward(list(found.values()), [of[f"grad{i}"] for i in numbers])
    found = {name: y.detach() for name, y in found.items()}
    return found | {name: leaf.grad for name, leaf in given.items() if leaf.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(implementation, device, case) -> None:
    of = leaves(case, device)
    got, expected = adapted(of, implementation), adapted(in_float64(of), "eager", apart=True)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        like = of["x" if name[0] == "y" else name]
        assert got[name].dtype == like.dtype
        # Several products are added up in the gradient of x, each rounded to its dtype.
        tolerance = max(TOLERANCE[like.dtype], EXACT) * (len(CASES[case][0]) if name == "x" else 1)
        assert_matches(got[name], value, tolerance=tolerance, name=name)
        for wrong in (torch.zeros_like(value), -value, value.roll(1, 0)):
            assert relative_l2(wrong, value) > 20 * tolerance or value.shape[0] == 1, name


def test_they_share_the_mask_of_keyed_dropout(implementation, device) -> None:
    """Nothing dropped is read: a NaN there stays where it is, for every layer and in both directions."""
    keys = torch.arange(ROWS, device=device) * 31
    kept = keyed_dropout(torch.ones(ROWS, INNER, device=device), keys, PLACE, P, implementation="eager") != 0
    x = torch.where(kept, spread((ROWS, INNER), FP32, device, 1), float("nan"))
    a = [spread((rank, INNER), FP32, device, rank) for rank in (4, 1, 6)]
    up = [spread((ROWS, rank), FP32, device, 7 + rank) for rank in (4, 1, 6)]
    plain, hashes = torch.where(kept, x, 0.0).double(), hashes_on(device)
    down = low_rank.low_rank_down(x, a, hashes, PLACE, P, implementation)
    assert_matches(down, plain @ torch.cat(a).double().T, tolerance=EXACT)
    grad = torch.zeros_like(x)
    grad_a = low_rank.add_low_rank_gradient_(grad, x, a, up, hashes, PLACE, P, [True, True], implementation)
    assert_matches(grad_a, torch.cat(up, 1).double().T @ plain, tolerance=EXACT)
    assert torch.equal(grad != 0, kept)
    assert_matches(grad, kept * (torch.cat(up, 1).double() @ torch.cat(a).double()), tolerance=EXACT)


SUBSETS = (("a1",), ("a0", "a2"), ("x", "a0"), ("x", "a0", "a1", "a2"), ("b0", "b1"), ("a0", "b0"))


def assert_subsets_alike(
    run: Callable[[tuple[str, ...]], Leaves], subsets: Sequence[tuple[str, ...]] = SUBSETS
) -> None:
    """``run(frozen)``: what it finds without a gradient for ``frozen`` is to the bit what it finds with all."""
    full = run(())
    for frozen in subsets:
        got = run(frozen)
        assert got.keys() == full.keys() - set(frozen)
        for name, value in got.items():
            assert torch.equal(value, full[name]), (frozen, name)


def test_every_subset_of_gradients(implementation, device) -> None:
    """The same gradients to the bit, whoever else has one; only those of x, the sum of all, come in other order."""
    of = leaves("three, r 1, 7 and 3", device)
    assert_subsets_alike(lambda frozen: adapted(of, implementation, frozen))


def test_a_part_that_nothing_used(implementation, device) -> None:
    of = leaves("three, r 1, 7 and 3", device)
    a = [of[f"a{i}"].requires_grad_() for i in range(3)]
    _, downs = lora_down(of["x"], a, hashes_on(device), PLACE, P, implementation=implementation)
    (downs[0].sum() + downs[2].square().sum()).backward()
    grads = [weight.grad for weight in a]
    assert not grads[1].any()
    for i, loss in ((0, lambda down: down.sum()), (2, lambda down: down.square().sum())):
        (alone,) = [of[f"a{i}"].detach().requires_grad_()]
        _, down = lora_down(of["x"], alone, hashes_on(device), PLACE, P, implementation=implementation)
        loss(down).backward()
        assert_matches(grads[i], alone.grad, tolerance=EXACT)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides(implementation, device, layout) -> None:
    """One A lies otherwise than the rest: a launch takes one layout."""
    of = leaves("three, r 16", device)
    expected = adapted(in_float64(of), "eager", apart=True)
    got = adapted(of | {"a1": strided(of["a1"], layout), "x": strided(of["x"], layout)}, implementation)
    for name, value in expected.items():
        tolerance = max(TOLERANCE[of["x" if name[0] == "y" else name].dtype], EXACT)
        assert_matches(got[name], value, tolerance=3 * tolerance, name=name)


def test_results_repeat_to_the_bit(implementation, device) -> None:
    of = leaves("three, r 16", device)
    first, second = adapted(of, implementation), adapted(of, implementation)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_launch_each_way_for_all(implementation, device, monkeypatch) -> None:
    if implementation != "triton":
        pytest.skip("launches of kernels")
    launched = stub_kernels(monkeypatch)
    adapted(leaves("three, r 16", device), implementation)
    assert launched.count("lora_down") == launched.count("lora_down_backward") == 1
    assert launched.count("lora_up") == launched.count("lora_up_backward") == 3
    assert launched.count("sum_parts") == 5  # P, three times Q and dB, dA
