"""``lora_down`` and ``lora_up`` around a base layer: value and every gradient against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, relative_l2, spread, strided
from repbend_kernels import implementation as use_implementation
from repbend_kernels import keyed_dropout, lora_down, lora_up, low_rank, low_rank_chunks, low_rank_sizes, scratch
from repbend_kernels.blocks import row_hashes
from torch import Tensor

from benchmarks.measure import peak_bytes

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PLACE, P, SCALING = 3, 0.5, 1.7
# Sums in 32 bits of exact products; one 16-bit part of a weight alone is off by 2⁻⁹ (bfloat16) or 2⁻¹² (float16).
EXACT = 2e-6
# Rows, inputs, outputs, rank, dtypes of activations and adapter: no size a multiple of a block, several blocks of each.
CASES = {
    "fp32, r 1": (37, 45, 70, 1, FP32, FP32),
    "fp32, r 128": (18, 40, 70, 128, FP32, FP32),
    "bf16, fp32 adapter, r 5": (37, 150, 270, 5, BF16, FP32),
    "bf16, fp32 adapter, r 100": (18, 45, 70, 100, BF16, FP32),
    "bf16, r 16": (37, 150, 270, 16, BF16, BF16),
    "bf16, r 33": (18, 45, 70, 33, BF16, BF16),
    "fp16, fp32 adapter, r 7": (37, 70, 135, 7, FP16, FP32),
    "fp16, r 20": (18, 70, 135, 20, FP16, FP16),
    "fp32, bf16 adapter, r 3": (18, 45, 70, 3, FP32, BF16),
}
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def many_parts(monkeypatch) -> None:
    """Sums in several parts, chunks and spans, the last ones short."""
    monkeypatch.setattr(low_rank_sizes, "LEAST_SLAB", 16)
    monkeypatch.setattr(low_rank_sizes, "LEAST_SPAN", 40)
    monkeypatch.setattr(low_rank_chunks, "CHUNK_ELEMENTS", {"cpu": 1000, "other": 1000})
    monkeypatch.setattr(low_rank_chunks, "LEAST_ROWS", 1)


def hashes_of(rows: int, device: torch.device) -> Tensor:
    return row_hashes(torch.arange(rows, device=device) * 31)


def leaves(case: str, device: torch.device) -> Leaves:
    rows, inner, outer, rank, dtype, adapter = CASES[case]
    return {
        "x": spread((rows, inner), dtype, device, 1),
        "a": spread((rank, inner), adapter, device, 2),
        "b": spread((outer, rank), adapter, device, 3),
        "w": spread((outer, inner), dtype, device, 4) / 8,
        "grad": spread((rows, outer), dtype, device, 5),
    }


def adapted(of: Leaves, implementation: str, dropout: bool, wanted: str = "xab") -> dict[str, Tensor]:
    """y = W x + f · B A (keep · x), and the gradients of those of x, A and B that are ``wanted``."""
    given = {name: of[name].detach().requires_grad_(name in wanted) for name in "xab"}
    hashes, p = (hashes_of(of["x"].shape[0], of["x"].device), P) if dropout else (None, 0.0)
    x, down = lora_down(given["x"] * 1, given["a"], hashes, PLACE, p, implementation=implementation)
    y = lora_up(x @ of["w"].T, down, given["b"], SCALING / (1 - p), implementation=implementation)
    y.backward(of["grad"])
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in given.items() if name in wanted}}


def in_float64(of: Leaves) -> Leaves:
    return {name: leaf.double() for name, leaf in of.items()}


@pytest.mark.parametrize(
    ("case", "dropout"), [*((case, True) for case in CASES), ("fp32, r 1", False), ("bf16, fp32 adapter, r 5", False)]
)
def test_value_and_gradients(implementation, device, case, dropout) -> None:
    of = leaves(case, device)
    got, expected = adapted(of, implementation, dropout), adapted(in_float64(of), "eager", dropout)
    for name, value in expected.items():
        like = of["x" if name == "y" else name]
        assert got[name].dtype == like.dtype
        # A float32 adapter's gradients see no rounding but their own.
        assert_matches(got[name], value, tolerance=max(TOLERANCE[like.dtype], EXACT), name=name)


def test_slabs_of_several_tiles(implementation, device, monkeypatch) -> None:
    """Sums run over a program's tiles, then over programs; the last of both is short."""
    monkeypatch.setattr(low_rank_sizes, "LEAST_SLAB", 64)
    shapes = {"x": (90, 30), "a": (3, 30), "b": (40, 3), "w": (40, 30), "grad": (90, 40)}
    of = {name: spread(shape, FP32, device, seed) for seed, (name, shape) in enumerate(shapes.items())}
    got, expected = adapted(of, implementation, True), adapted(in_float64(of), "eager", True)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=TOLERANCE[FP32], name=name)


def test_float64(device) -> None:
    of = in_float64(leaves("fp32, r 1", device))
    got, expected = adapted(of, "torch", True), adapted(of, "eager", True)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=1e-14, name=name)


@pytest.mark.parametrize("case", ["bf16, fp32 adapter, r 5", "fp16, fp32 adapter, r 7"])
def test_16_bit_rows_lose_nothing_of_a_wide_adapter(implementation, device, case) -> None:
    """Each of the four products, at an accuracy that a weight rounded to 16 bits does not have."""
    of = leaves(case, device)
    exact, dtype = in_float64(of), of["x"].dtype
    rounded = {name: leaf.to(dtype).double() for name, leaf in of.items()}
    down = low_rank.low_rank_down(of["x"], [of["a"]], None, 0, 0.0, implementation)
    up, grad_b = low_rank.low_rank_up_gradients(of["grad"], down, of["b"], SCALING, [True, True], implementation)
    grad_a = low_rank.add_low_rank_gradient_(
        torch.zeros_like(of["x"]), of["x"], [of["a"]], [up], None, 0, 0.0, [True, True], implementation
    )
    found = {
        "P": (down, lambda v: v["x"] @ v["a"].T),
        "Q": (up, lambda v: SCALING * v["grad"] @ v["b"]),
        "dB": (grad_b, lambda v: SCALING * v["grad"].T @ v["down"]),
        "dA": (grad_a, lambda v: v["up"].T @ v["x"]),
    }
    exact |= {"down": down.double(), "up": up.double()}
    rounded |= {"down": down.to(dtype).double(), "up": up.to(dtype).double()}
    for name, (got, plain) in found.items():
        assert_matches(got, plain(exact), tolerance=EXACT, name=name)
        assert relative_l2(plain(rounded), plain(exact)) > 20 * EXACT, f"{name}: rounding would not show"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_what_is_added_is_rounded_once(implementation, device, dtype) -> None:
    of = leaves("bf16, fp32 adapter, r 5", device)
    down, base = spread((37, 5), FP32, device, 6), spread((37, 270), FP32, device, 7).to(dtype)
    expected = base.double() + SCALING * down.double() @ of["b"].double().T
    low_rank.add_low_rank_up_(base, down, of["b"], SCALING, implementation)
    assert_matches(base, expected, tolerance=TOLERANCE[dtype])
    # Two roundings, or one of what is added alone, leave more elements off by a step.
    steps = (base.double() - expected).abs() / (expected.abs() * torch.finfo(dtype).eps)
    assert steps.max() <= (1.001 if implementation == "triton" and device.type == "cpu" else 0.501)


def test_every_subset_of_gradients(implementation, device) -> None:
    """The same gradients to the bit, whoever else has one, in every run."""
    of = leaves("fp32, bf16 adapter, r 3", device)
    full = adapted(of, implementation, True)
    for wanted in ("x", "a", "b", "xa", "xb", "ab", "xab"):
        got = adapted(of, implementation, True, wanted)
        assert set(got) == {"y", *wanted}
        for name, value in got.items():
            assert torch.equal(value, full[name]), (wanted, name)


def test_the_mask_is_that_of_keyed_dropout(implementation, device) -> None:
    """In P, in dA and in dx, of which nothing dropped may be read: a NaN there stays where it is."""
    rows, inner = 37, 45
    hashes, keys = hashes_of(rows, device), torch.arange(rows, device=device) * 31
    kept = keyed_dropout(torch.ones(rows, inner, device=device), keys, PLACE, P, implementation="eager") != 0
    x = torch.where(kept, spread((rows, inner), FP32, device, 1), float("nan"))
    a, up = spread((4, inner), FP32, device, 2), spread((rows, 4), FP32, device, 3)
    plain = torch.where(kept, x, 0.0)
    down = low_rank.low_rank_down(x, [a], hashes, PLACE, P, implementation)
    assert_matches(down, plain.double() @ a.double().T, tolerance=EXACT)
    grad = torch.zeros_like(x)
    grad_a = low_rank.add_low_rank_gradient_(grad, x, [a], [up], hashes, PLACE, P, [True, True], implementation)
    assert_matches(grad_a, up.double().T @ plain.double(), tolerance=EXACT)
    assert torch.equal(grad != 0, kept)
    assert_matches(grad, kept * (up.double() @ a.double()), tolerance=EXACT)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_a_zero_b_changes_no_bit(implementation, device, dtype) -> None:
    result = spread((37, 70), dtype, device, 1)
    before = result.clone()
    down = spread((37, 8), FP32, device, 2)
    low_rank.add_low_rank_up_(result, down, torch.zeros(70, 8, device=device), SCALING, implementation)
    assert torch.equal(result, before)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides(implementation, device, layout) -> None:
    of = leaves("bf16, r 33", device)
    expected = adapted(in_float64(of), "eager", True)
    got = adapted({name: strided(leaf, layout) for name, leaf in of.items()}, implementation, True)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=TOLERANCE[BF16], name=name)
    base, down = strided(of["grad"], layout), strided(spread((18, 33), FP32, device, 6), layout)
    expected = base.double() + SCALING * down.double() @ of["b"].double().T
    low_rank.add_low_rank_up_(base, down, of["b"], SCALING, implementation)
    assert_matches(base, expected, tolerance=TOLERANCE[BF16])
    grad, up = strided(of["x"], layout), strided(spread((18, 33), FP32, device, 7), layout)
    expected = grad.double() + up.double() @ of["a"].double()
    low_rank.add_low_rank_gradient_(grad, of["x"], [of["a"]], [up], None, 0, 0.0, [True, False], implementation)
    assert_matches(grad, expected, tolerance=TOLERANCE[BF16])


def test_hashes_with_gaps(implementation, device) -> None:
    x, a = spread((18, 45), FP32, device, 1), spread((4, 45), FP32, device, 2)
    hashes = hashes_of(36, device)[::2]
    got, expected = (
        low_rank.low_rank_down(x, [a], keys, PLACE, P, implementation) for keys in (hashes, hashes.contiguous())
    )
    assert torch.equal(got, expected)


def test_rows_that_share_memory_are_not_written_to(implementation, device) -> None:
    row, down, b = torch.zeros(1, 8, device=device), torch.ones(3, 2, device=device), torch.ones(8, 2, device=device)
    with pytest.raises(RuntimeError, match=r"clone\(\)"):
        lora_up(row.expand(3, 8), down, b, 1.0, implementation=implementation)
    with pytest.raises(RuntimeError, match=r"clone\(\)"):
        low_rank.add_low_rank_gradient_(
            row.expand(3, 8), down @ b.T, [b.T], [down], None, 0, 0.0, [True, True], implementation
        )


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(implementation, device, rows) -> None:
    of = leaves("fp32, r 1", device)
    of = {name: leaf if name in "abw" else leaf[:rows] for name, leaf in of.items()}
    got, expected = adapted(of, implementation, False), adapted(in_float64(of), "eager", False)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=TOLERANCE[FP32], name=name)
    with torch.no_grad(), use_implementation(implementation):
        source, down = lora_down(of["x"], of["a"])
        y = lora_up(source @ of["w"].T, down, of["b"], SCALING)
    assert_matches(y, expected["y"], tolerance=TOLERANCE[FP32])


@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32)], ids=str)
def test_the_parts_take_what_the_rule_says(implementation, device, monkeypatch, dtype, adapter) -> None:
    if implementation != "triton":
        pytest.skip("the torch path has chunks, not parts")
    rows, inner, rank = 300, 700, 3
    x, grad = spread((rows, inner), dtype, device, 1), spread((rows, inner), dtype, device, 2)
    a, b = spread((rank, inner), adapter, device, 3), spread((inner, rank), adapter, device, 4)
    down = spread((rows, rank), FP32, device, 5)
    # The sizes alone matter: without the kernels' work the test is quick.
    calls = {
        "low_rank_down": (x, [a], None, 0, 0.0, implementation),
        "low_rank_up_gradients": (grad, down, b, SCALING, [True, True], implementation),
        "add_low_rank_gradient_": (grad, x, [a], [down], None, 0, 0.0, [True, True], implementation),
    }
    stub_kernels(monkeypatch)
    for name, arguments in calls.items():
        op = getattr(torch.ops.repbend_kernels, name).default
        rule = scratch.scratch_bytes(f"repbend_kernels::{name}", torch.device("cuda"), arguments)
        made = op(*arguments)
        results = sum(t.numel() * t.element_size() for t in (made if isinstance(made, list) else [made]))
        inside = peak_bytes(lambda op=op, arguments=arguments: op(*arguments), device) - results
        assert 0 < inside <= rule, name


class _NoKernel:
    """A kernel that is launched and does nothing but count."""

    def __init__(self, launched: list[str], name: str) -> None:
        self.launched, self.name = launched, name

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **constants: self.launched.append(self.name)


def stub_kernels(monkeypatch) -> list[str]:
    """No kernel runs; the names of those that would have."""
    from repbend_kernels.triton import low_rank_launch

    launched: list[str] = []
    for name in [name for name in vars(low_rank_launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(low_rank_launch, name, _NoKernel(launched, name.removesuffix("_kernel")))
    return launched


def test_an_adapted_layer_takes_two_launches_and_four_back(implementation, device, monkeypatch) -> None:
    """Fewer than 4096 rows take one more, which adds up the spans of P."""
    if implementation != "triton":
        pytest.skip("launches of kernels")
    launched = stub_kernels(monkeypatch)
    back = ["lora_up_backward", "sum_parts", "lora_down_backward", "sum_parts"]
    for rows, spans in ((4100, 1), (20, 2)):
        of = {name: torch.zeros(shape) for name, shape in (("x", (rows, 80)), ("a", (4, 80)), ("b", (96, 4)))}
        adapted({**of, "w": torch.zeros(96, 80), "grad": torch.zeros(rows, 96)}, implementation, True)
        assert launched == ["lora_down", *["sum_parts"] * (spans > 1), "lora_up", *back]
        launched.clear()


def test_the_device_is_full_and_parts_are_few() -> None:
    """At the sizes of an 8B model: enough programs, and parts that are small beside what a kernel reads."""
    for rows, width in ((1456, 4096), (2623, 14336), (5560, 1024), (5560, 14336)):
        sizes = low_rank_sizes.tiles(16, width, BF16, FP32)
        owned = ((low_rank_sizes.up_back_rows(sizes.rank), sizes.up), (low_rank_sizes.DOWN_BACK_ROWS, sizes.down))
        for tile_rows, columns in owned:
            steps = low_rank_sizes.slab_steps(rows, width, tile_rows, columns)
            slabs = low_rank_sizes.blocks(rows, steps * tile_rows)
            assert 90 <= slabs * low_rank_sizes.blocks(width, columns) <= 2 * low_rank_sizes.PROGRAMS
        tile_rows = low_rank_sizes.down_rows(rows)
        steps = low_rank_sizes.span_steps(rows, width, tile_rows, sizes.walked)
        spans = low_rank_sizes.blocks(width, steps * sizes.walked)
        assert spans * low_rank_sizes.blocks(rows, tile_rows) >= 80
        assert spans == 1 or rows < 4096
        assert low_rank_sizes.parts_bytes(rows, width, 16, BF16, FP32) < 0.7 * 2 * rows * width
