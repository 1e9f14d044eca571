"""``keyed_dropout``: masks by definition, the same on every path, independent where they should be."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, spread, strided
from repbend_kernels import implementation as use_implementation
from repbend_kernels import keyed_dropout
from repbend_kernels.keyed_dropout import KeyedMask, row_hashes
from repbend_kernels.oracles import keyed_dropout_reference
from torch import Tensor

CPU = torch.device("cpu")
SEED, P = 5, 0.3


def some_keys(*shape: int, device: torch.device = CPU) -> Tensor:
    """Keys over the whole range of int64, negative ones among them."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device)


def dropped(keys: Tensor, width: int, seed: int = SEED, p: float = P, implementation: str = "torch") -> Tensor:
    """1 where an element is dropped, [N, width]."""
    ones = torch.ones(*keys.shape, width, device=keys.device)
    return 1 - keyed_dropout(ones, keys, seed, p, scaled=False, implementation=implementation)


def hash_of(key: int, seed: int, column: int) -> int:
    """The hash of one element in Python's own integers, from the published constants."""

    def mix(value: int, bits: int, steps: list[tuple[int, int]], last: int) -> int:
        for shift, factor in steps:
            value = (value ^ (value >> shift)) * factor % 2**bits
        return value ^ (value >> last)

    steps = [(16, 0x7FEB352D), (15, 0x846CA68B)]
    row = mix((key + 0x9E3779B97F4A7C15) % 2**64, 64, [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)], 31) >> 32
    column = mix((mix(seed % 2**32, 32, steps, 16) + column * 0x9E3779B9) % 2**32, 32, steps, 16)
    value = (row ^ column) * 0x7FEB352D % 2**32
    value = (value ^ (column >> 16 | column % 2**16 << 16)) * 0x7B935975 % 2**32
    return (value + 2**31) % 2**32  # signed order


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3])
def test_the_mask_is_the_one_defined(implementation, device, seed) -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    got = dropped(torch.tensor(keys, device=device), 37, seed, 0.4, implementation).tolist()
    # Signed hashes are compared with 2³¹ − (1 − p)·2³², which orders all 2³² values as adding 2³¹ does.
    assert got == [
        [float(hash_of(key, seed, column) <= 2**32 - round(0.6 * 2**32)) for column in range(37)] for key in keys
    ]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(3, 5, 70), (1, 1, 1), (2, 3, 1100)], ids=str)
def test_value_and_gradient(implementation, device, shape, dtype, layout) -> None:
    keys = some_keys(*shape[:-1], device=device)
    leaf = strided(spread(shape, dtype, device, 1), layout).detach().requires_grad_()
    got = keyed_dropout(leaf, keys, SEED, P, implementation=implementation)
    weights = spread(shape, dtype, device, 2)
    got.backward(weights)
    double = leaf.detach().double().requires_grad_()
    expected = keyed_dropout(double, keys, SEED, P, implementation="eager")
    expected.backward(weights.double())
    assert (got.dtype, leaf.grad.dtype) == (dtype, dtype)
    assert torch.equal(got == 0, expected == 0)
    assert torch.equal(leaf.grad == 0, double.grad == 0)
    assert_matches(got, expected, tolerance=TOLERANCE[dtype])
    assert_matches(leaf.grad, double.grad, tolerance=TOLERANCE[dtype])


def test_the_factor_can_be_left_out(implementation, device) -> None:
    x, keys = spread((6, 33), torch.float32, device, 1), some_keys(6, device=device)
    plain = keyed_dropout(x, keys, SEED, P, scaled=False, implementation=implementation)
    assert torch.equal(plain, torch.where(plain == 0, 0.0, x))
    assert_matches(keyed_dropout(x, keys, SEED, P, implementation=implementation), plain / (1 - P), tolerance=1e-6)


def test_a_list_gets_one_mask(implementation, device) -> None:
    keys = some_keys(9, device=device)
    xs = [spread((9, 40), torch.float32, device, i).requires_grad_() for i in range(2)]
    both = keyed_dropout(xs, keys, SEED, P, implementation=implementation)
    for x, y in zip(xs, both):
        assert torch.equal(y, keyed_dropout(x, keys, SEED, P, implementation=implementation))
    both[1].sum().backward()
    assert torch.equal(xs[1].grad != 0, both[1] != 0)
    assert xs[0].grad is None or not xs[0].grad.any()


@pytest.mark.parametrize("hashed", [False, True], ids=["keys", "hashed"])
def test_blocks_of_a_mask_are_those_of_the_op(implementation, device, hashed) -> None:
    """What an op that walks rows itself uses: blocks of any sizes, in place or not, a source with gaps, keys hashed
    once for all.
    """
    keys, x = some_keys(50, device=device), spread((50, 70), torch.float32, device, 1)
    expected = keyed_dropout(x, keys, SEED, P, scaled=False, implementation=implementation)
    with use_implementation(implementation):
        mask = KeyedMask(row_hashes(keys) if hashed else keys, SEED, P, 70, torch.float32, hashed=hashed)
    source, out, other = strided(x, "sliced"), torch.empty_like(x), 2 * x
    for first, last in ((0, 20), (20, 21), (21, 50)):
        mask.apply([source[first:last], other[first:last]], [out[first:last], other[first:last]], first, last)
    assert torch.equal(out, expected)
    assert torch.equal(other, 2 * expected)


def test_a_row_keeps_its_mask_wherever_it_lies(implementation, device) -> None:
    keys = some_keys(64, device=device)
    whole = dropped(keys, 1500, implementation=implementation)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(dropped(keys[order], 1500, implementation=implementation), whole[order])
    pieces = [dropped(keys[start : start + 7], 1500, implementation=implementation) for start in range(0, 64, 7)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(dropped(keys, 900, implementation=implementation), whole[:, :900])


def test_float64(device) -> None:
    x, keys = spread((5, 70), torch.float64, device, 1).requires_grad_(), some_keys(5, device=device)
    assert torch.equal(keyed_dropout(x, keys, SEED, P), keyed_dropout(x, keys, SEED, P, implementation="eager"))
    assert torch.autograd.gradcheck(lambda t: keyed_dropout(t, keys, SEED, P), x)


def test_what_is_dropped_is_zero_even_where_it_is_not_finite(implementation, device) -> None:
    keys = some_keys(8, device=device)
    x = torch.full((8, 50), float("nan"), device=device)
    x[4:] = float("inf")
    y = keyed_dropout(x, keys, SEED, P, implementation=implementation)
    assert torch.equal(y == 0, dropped(keys, 50, implementation=implementation) == 1)


def test_probabilities_at_the_edges(implementation, device) -> None:
    x, keys = torch.ones(50, 200, device=device), some_keys(50, device=device)
    assert keyed_dropout(x, keys, SEED, 0.0, implementation=implementation) is x
    assert dropped(keys, 200, p=2**-33, implementation=implementation).sum() == 0
    assert (keyed_dropout(x, keys, SEED, 1 - 2**-50, implementation=implementation) == 0).all()
    half = dropped(keys, 200, p=0.5, implementation=implementation)
    more = dropped(keys, 200, p=0.6, implementation=implementation)
    assert ((more - half) >= 0).all()  # a larger probability drops what a smaller one drops


def test_no_rows(implementation, device) -> None:
    x = torch.empty(0, 8, device=device, requires_grad=True)
    y = keyed_dropout(x, some_keys(0, device=device), SEED, P, implementation=implementation)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8)


# Standard deviations allowed: the largest of a few thousand independent rates stays below.
SIGMAS = 5.0
ROWS, WIDTH, RATE = 2048, 1024, 0.05


@pytest.fixture(scope="module", params=["counted", "packed"])
def neighbours(request) -> Tensor:
    """Keys that differ in few bits: positions alone, or sequence and position in one number."""
    if request.param == "counted":
        return torch.arange(ROWS)
    return ((torch.arange(ROWS) // 64) << 32 | torch.arange(ROWS) % 64) ^ 0x1234567890ABCDE


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of two masks in units of its standard deviation for independent ones."""
    return float(((a - RATE) * (b - RATE)).mean() / (RATE * (1 - RATE)) * math.sqrt(a.numel()))


def test_rates(neighbours) -> None:
    mask = dropped(neighbours, WIDTH, p=RATE)
    deviation = math.sqrt(RATE * (1 - RATE))
    for count, rates in ((mask.numel(), mask.mean()), (WIDTH, mask.mean(1)), (ROWS, mask.mean(0))):
        assert (rates - RATE).abs().max() * math.sqrt(count) / deviation < SIGMAS
    # Neither too even: rates of rows and columns spread as independent draws do.
    for count, rates in ((WIDTH, mask.mean(1)), (ROWS, mask.mean(0))):
        assert float(rates.std()) * math.sqrt(count) / deviation == pytest.approx(1, abs=0.15)


def test_neighbouring_rows_columns_and_places_are_independent(neighbours) -> None:
    mask = dropped(neighbours, WIDTH, p=RATE)
    for step in (1, 2, 3, 64, 512):
        assert abs(correlation(mask[step:], mask[:-step])) < SIGMAS
        assert abs(correlation(mask[:, step:], mask[:, :-step])) < SIGMAS
    for other in (SEED + 1, SEED - 1, SEED ^ 2**31, SEED + 1000):
        elsewhere = dropped(neighbours, WIDTH, other, RATE)
        assert abs(correlation(mask, elsewhere)) < SIGMAS
        assert abs(correlation(mask[1:], elsewhere[:-1])) < SIGMAS
    # The comparison sees what it looks for.
    assert correlation(mask, mask) > 1000


def test_no_two_rows_or_columns_are_alike(neighbours) -> None:
    """Every pair, not the average pair: hashes of columns meet those of rows in two multiplications only."""
    mask = dropped(neighbours, WIDTH, p=0.5) * 2 - 1
    for signs in (mask, mask.T):
        products = signs @ signs.T / math.sqrt(signs.shape[1])
        products.fill_diagonal_(0)
        assert products.abs().max() < 6.5  # about 5 for a million independent pairs
        assert products.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("keys", "p", "error", "message"),
    [
        (torch.zeros(3), P, TypeError, "keys: expected an int64 tensor, got torch.float32"),
        (torch.zeros(4, dtype=torch.int64), P, ValueError, r"keys: expected shape \[3\] or \[3\]"),
        (torch.zeros(3, dtype=torch.int64), 1.0, ValueError, "p: expected 0 <= p < 1, got 1.0"),
        (torch.zeros(3, dtype=torch.int64), -0.1, ValueError, "p: expected 0 <= p < 1, got -0.1"),
        (torch.zeros(3, dtype=torch.int64), float("nan"), ValueError, "p: expected 0 <= p < 1, got nan"),
    ],
)
def test_wrong_arguments(keys, p, error, message) -> None:
    with pytest.raises(error, match=message):
        keyed_dropout(torch.ones(3, 4), keys, SEED, p)


def test_keys_are_not_taken_for_hashes() -> None:
    for keys, hashed in ((torch.arange(3, dtype=torch.int32), False), (torch.arange(3), True)):
        with pytest.raises(TypeError, match="keys: expected an int"):
            KeyedMask(keys, SEED, P, 4, torch.float32, hashed=hashed)


def test_wrong_lists() -> None:
    keys = torch.zeros(3, dtype=torch.int64)
    for wrong, message in (
        ([], "got none"),
        ([torch.ones(3, 4), torch.ones(3, 5)], r"x\[1\]"),
        ([torch.ones(3, 4), keys], r"x\[1\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            keyed_dropout(wrong, keys, SEED, P)


def test_the_oracle_takes_what_the_op_gets() -> None:
    ones = torch.ones(4, 9, dtype=torch.float64)
    assert torch.equal(keyed_dropout_reference(ones, some_keys(4), 1, -(2**31), 2.0), 2 * ones)
