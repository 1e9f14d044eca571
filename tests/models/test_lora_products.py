"""LoRA's matrix products as CUDA takes them, wide operands in 16-bit parts, on whatever device is here, against
float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from repbend_kernels import low_rank, wide_products
from repbend_kernels.keyed_dropout import KeyedMask, row_hashes
from test_lora_forward import KEYS, P, inputs, ours, outcome, peft_model
from torch import Tensor

from repbend_fast.models.layers import lora

ROWS, WIDTH, OUT, RANK = 200, 96, 160, 8
FACTOR = 1.7
PLACE = 3
DTYPES = [torch.bfloat16, torch.float16]
# Sums in 32 bits over operands that hold 16 bits (bfloat16) or more of a weight's 24. One 16-bit part alone is off by
# 2⁻⁹ or 2⁻¹².
TOLERANCE = {torch.bfloat16: 1e-5, torch.float16: 2e-6}

pytestmark = pytest.mark.usefixtures("parts")


@pytest.fixture
def parts(monkeypatch) -> None:
    """The choice of a CUDA device, and several chunks of rows."""
    monkeypatch.setattr(wide_products, "PRODUCTS", "parts")
    monkeypatch.setattr(low_rank, "CHUNK_ELEMENTS", {"cpu": 64 * OUT, "other": 64 * OUT})


def wide(*shape: int, seed: int) -> Tensor:
    """float32 values that 16 bits do not hold."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hashes_of(dropout: bool) -> Tensor | None:
    return row_hashes(torch.arange(ROWS) * 31) if dropout else None


def kept(x: Tensor, hashes: Tensor | None) -> Tensor:
    """x in float64 where the mask keeps it, 0 elsewhere."""
    if hashes is None:
        return x.double()
    out = x.clone()
    KeyedMask(hashes, PLACE, P, x.shape[1], x.dtype, hashed=True).apply([x], [out], 0, x.shape[0])
    return out.double()


def assert_rounded_once(got: Tensor, exact: Tensor, dtype: torch.dtype, allowed: float = 1.02) -> None:
    """No further from ``exact`` than rounding to ``dtype`` puts it."""
    assert got.dtype == dtype
    assert relative_l2(got, exact) <= allowed * relative_l2(exact.to(dtype), exact)


@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_forward_against_float64(dtype, dropout) -> None:
    x, a, b, hashes = (
        wide(ROWS, WIDTH, seed=0).to(dtype),
        wide(RANK, WIDTH, seed=1),
        wide(OUT, RANK, seed=2),
        hashes_of(dropout),
    )
    down = low_rank.low_rank_down(x, a, hashes, PLACE, P)
    exact = kept(x, hashes) @ a.double().T
    assert down.dtype == torch.float32
    assert_matches(down, exact, tolerance=TOLERANCE[dtype])
    assert relative_l2(kept(x, hashes) @ a.to(dtype).double().T, exact) > 20 * TOLERANCE[dtype], (
        "the low parts do not show"
    )

    for base in (torch.zeros(ROWS, OUT), wide(ROWS, OUT, seed=3)):
        y = base.to(dtype)
        expected = y.double() + FACTOR * down.double() @ b.double().T
        low_rank.add_low_rank_up_(y, down, b, FACTOR)
        assert_rounded_once(y, expected, dtype)


@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_backward_against_float64(dtype, dropout) -> None:
    x, grad = wide(ROWS, WIDTH, seed=0).to(dtype), wide(ROWS, OUT, seed=4).to(dtype)
    a, b, down, hashes = (
        wide(RANK, WIDTH, seed=1),
        wide(OUT, RANK, seed=2),
        wide(ROWS, RANK, seed=5),
        hashes_of(dropout),
    )
    up, grad_b = low_rank.low_rank_up_gradients(grad, down, b, FACTOR, [True, True])
    assert_matches(up, FACTOR * grad.double() @ b.double(), tolerance=TOLERANCE[dtype], name="Q")
    assert_matches(grad_b, FACTOR * grad.double().T @ down.double(), tolerance=TOLERANCE[dtype], name="dB")

    up = up / 16
    mask = kept(torch.ones_like(x), hashes)
    for base in (torch.zeros(ROWS, WIDTH), wide(ROWS, WIDTH, seed=6)):
        grad_x = base.to(dtype)
        added = mask * (up.double() @ a.double())
        expected = grad_x.double() + added
        grad_a = low_rank.add_low_rank_gradient_(grad_x, x, a, up, hashes, PLACE, P, [True, True])
        # With a mask the product is rounded before it is added, so twice in all.
        assert_rounded_once(grad_x, expected, dtype, allowed=1.5 if dropout and base.any() else 1.02)
        assert_matches(grad_a, up.double().T @ kept(x, hashes), tolerance=TOLERANCE[dtype], name="dA")


@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_a_model_s_error_is_that_of_wide_products(monkeypatch, dtype, narrow, dropout) -> None:
    model = ours(peft_model(dtype, adapter_dtype=dtype if narrow else torch.float32))
    keys = KEYS if dropout else None
    exact = outcome(copy.deepcopy(model).double(), inputs(dtype).double(), keys)
    found = {}
    for products in ("wide", "parts"):
        monkeypatch.setattr(wide_products, "PRODUCTS", products)
        found[products] = outcome(model, inputs(dtype), keys)
    for name, value in exact.items():
        assert found["parts"][name].dtype == found["wide"][name].dtype
        assert relative_l2(found["parts"][name], value) <= 1.1 * relative_l2(found["wide"][name], value) + 1e-6, name
    assert any(not torch.equal(found["parts"][name], found["wide"][name]) for name in exact), (
        "the switch changes nothing"
    )


def test_at_the_start_the_parts_add_nothing() -> None:
    """B = 0: the adapted output is the base's to the bit, whatever the products are made of."""
    for dtype in DTYPES:
        model = ours(peft_model(dtype, adapter_dtype=torch.float32, init_lora_weights=True))
        with torch.no_grad(), model.disable_adapter():
            expected = model(inputs(dtype))
        with lora.lora_dropout(model, KEYS):
            assert torch.equal(model(inputs(dtype)), expected)
