"""``dequantize_nf4``: the weights of bitsandbytes' layout, of one- and two-level scales, to the bit."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import assert_matches, spread
from repbend_kernels import dequantize_nf4 as op
from repbend_kernels.blocks import Nf4Scales, dequantize_nf4, nf4_linear
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Rows and columns: a whole number of programs, less than one, and a last block of scales that is short.
SHAPES = {"programs": (96, 128), "small": (3, 64), "short block": (7, 50), "one outer block and a bit": (260, 64)}


def weights(shape: tuple[int, int], nested: bool, device: torch.device, block: int) -> tuple[Tensor, Tensor, Nf4Scales]:
    """Packed codes of every kind, a table, and scales of either kind."""
    count, random = shape[0] * shape[1], torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, generator=random).to(device)
    table, blocks = spread((16,), FP32, device, 1), -(-count // block)
    if not nested:
        return packed, table, Nf4Scales(spread((blocks,), FP32, device, 2))
    levels = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=random).to(device)
    outer = spread((-(-blocks // 256),), FP32, device, 4)
    return packed, table, Nf4Scales(levels, spread((256,), FP32, device, 5), outer, spread((1,), FP32, device, 6)[0])


def expected(packed: Tensor, table: Tensor, scales: Nf4Scales, shape: tuple[int, int], block: int) -> Tensor:
    """Weight by weight, each product and sum rounded to float32."""
    levels = scales.levels.tolist() if scales.code is None else None
    found = torch.empty(shape[0] * shape[1])
    for i in range(found.numel()):
        byte = int(packed.reshape(-1)[i // 2])
        b = i // block
        if levels is not None:
            scale = scales.levels[b]
        else:
            scale = scales.code[int(scales.levels[b])] * scales.outer[b // 256] + scales.offset
        found[i] = table[byte >> 4 if i % 2 == 0 else byte & 15] * scale
    return found.view(shape)


@pytest.mark.parametrize("nested", [False, True], ids=["one level", "two levels"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_is_its_code_times_its_scale(implementation, device, shape, nested) -> None:
    given = weights(SHAPES[shape], nested, device, 64)
    got = dequantize_nf4(*given, SHAPES[shape], FP32, implementation=implementation)
    exact = dequantize_nf4(*given, SHAPES[shape], FP32, implementation="eager")
    assert torch.equal(got, exact)
    if shape == "small":
        assert torch.equal(got.cpu(), expected(*given, SHAPES[shape], 64))
    assert not torch.equal(got, exact.roll(1, 0))


@pytest.mark.parametrize("nested", [False, True], ids=["one level", "two levels"])
def test_chunks_go_on_where_the_last_one_ended(implementation, device, nested, monkeypatch) -> None:
    """On the torch path: a chunk has its own blocks' scales; the last one is short."""
    given = weights((7, 50), nested, device, 64)
    exact = dequantize_nf4(*given, (7, 50), FP32, implementation="eager")
    monkeypatch.setattr(op, "CHUNK", 64)
    assert torch.equal(dequantize_nf4(*given, (7, 50), FP32, implementation=implementation), exact)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_results_are_rounded_once(implementation, device, dtype, block) -> None:
    given = weights((40, 96), True, device, block)
    wide = dequantize_nf4(*given, (40, 96), FP32, block=block, implementation="eager")
    got = dequantize_nf4(*given, (40, 96), dtype, block=block, implementation=implementation)
    steps = (got.double() - wide.double()).abs() / (wide.double().abs() * torch.finfo(dtype).eps)
    # The interpreter cuts bfloat16 where a GPU rounds.
    cut = implementation == "triton" and device.type == "cpu" and dtype == BF16
    assert steps[wide.abs() > 1e-3].max() <= (1.001 if cut else 0.501)


def test_bitsandbytes_own_weights(implementation, device) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the layout is bitsandbytes'")
    weight = spread((64, 192), FP32, torch.device("cpu"), 8).to(device)
    for double in (False, True):
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        inner = state.state2
        scales = (
            Nf4Scales(state.absmax) if not double else Nf4Scales(state.absmax, inner.code, inner.absmax, state.offset)
        )
        got = dequantize_nf4(packed, state.code, scales, (64, 192), FP32, implementation=implementation)
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(got, theirs)
        assert 0 < float((got - weight).norm() / weight.norm()) < 0.15


def test_products_keep_nothing_of_x(implementation, device) -> None:
    given, bias = weights((96, 128), True, device, 64), spread((96,), FP32, device, 9)
    matrix = dequantize_nf4(*given, (96, 128), torch.float32, implementation="eager").double()
    x = spread((5, 128), FP32, device, 10).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nf4_linear(x, *given, (96, 128), bias, implementation=implementation)
    grad = spread((5, 96), FP32, device, 11)
    y.backward(grad)
    assert kept == []
    assert_matches(y, x.double() @ matrix.T + bias, tolerance=1e-6)
    assert_matches(x.grad, grad.double() @ matrix, tolerance=1e-6)
    with pytest.raises(ValueError, match="x: expected width 128, got 64"):
        nf4_linear(x[:, :64], *given, (96, 128), implementation=implementation)


def test_no_weights(implementation, device) -> None:
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    scales = Nf4Scales(torch.empty(0, device=device))
    got = dequantize_nf4(empty, torch.zeros(16, device=device), scales, (0, 64), BF16, implementation=implementation)
    assert got.shape == (0, 64)


def test_sizes_that_do_not_belong_together(device) -> None:
    packed, table, scales = weights((3, 64), True, device, 64)
    wrong = {
        "packed: expected 256 weights": lambda: dequantize_nf4(packed, table, scales, (4, 64), FP32),
        "table: expected 16 values": lambda: dequantize_nf4(packed, table[:8], scales, (3, 64), FP32),
        "scales: expected one for each of 6": lambda: dequantize_nf4(packed, table, scales, (3, 64), FP32, block=32),
        "block: expected a power of two": lambda: dequantize_nf4(packed, table, scales, (3, 64), FP32, block=48),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="packed: expected uint8"):
        dequantize_nf4(packed.int(), table, scales, (3, 64), FP32)
    with pytest.raises(TypeError, match="levels are uint8 with code"):
        dequantize_nf4(packed, table, Nf4Scales(scales.levels), (3, 64), FP32)
