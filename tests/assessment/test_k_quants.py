"""K-quants: packed as a file has them, gguf reads their numbers as the same weights; the error is that of the bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from repbend_fast.assessment import k_quants
from repbend_fast.assessment.few_bits import gguf, rounding_to
from repbend_fast.assessment.k_quants import Blocks, k_quant, kind_in_q4_k_m, symmetric, with_minimum
from repbend_fast.models.layers.rounded import Place


def integers(values: torch.Tensor) -> np.ndarray:
    found = values.numpy().astype(np.int64)
    assert np.array_equal(found, values.numpy())
    return found


def half(values: torch.Tensor) -> np.ndarray:
    return values.numpy().astype(np.float16).view(np.uint8)


def packed_q4_k(blocks: Blocks) -> np.ndarray:
    """144 bytes for each group: d, d', 12 bytes of scales and offsets, two levels in a byte."""
    s, m, q = (integers(part) for part in (blocks.scales, blocks.mins, blocks.levels))
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    pairs = q.reshape(-1, 4, 2, 32)
    levels = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    parts = [half(blocks.d), half(blocks.d_min), first, second, third, levels]
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=1)


def packed_q6_k(blocks: Blocks) -> np.ndarray:
    """210 bytes for each group: low four bits, high two, 16 scales, d."""
    q = (integers(blocks.levels) + 32).reshape(-1, 2, 4, 32)
    low = np.stack([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], axis=2)
    high = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    scales = integers(blocks.scales).astype(np.int8).view(np.uint8)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scales, half(blocks.d)]
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=1)


def ragged(rows: int = 6, width: int = 512) -> torch.Tensor:
    """Weights with outliers, an all-zero block, one of a single sign, and one of a constant."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=random) * torch.rand(rows, width // 32, 1, generator=random).repeat(
        1, 1, 32
    ).reshape(rows, width)
    weight[0, :256] = 0
    weight[1, :32] = weight[1, :32].abs() + 0.5
    weight[2, :32] = -0.25
    weight[3, 7] = 9.0
    return weight


@pytest.mark.parametrize(
    ("kind", "encode", "pack"),
    [
        (GGMLQuantizationType.Q4_K, lambda weight: with_minimum(weight, 4), packed_q4_k),
        (GGMLQuantizationType.Q6_K, symmetric, packed_q6_k),
    ],
    ids=["q4_k", "q6_k"],
)
def test_gguf_reads_the_packed_numbers_as_the_same_weights(kind, encode, pack) -> None:
    weight = ragged()
    blocks = encode(weight)
    read = dequantize(pack(blocks).reshape(len(weight), -1), kind)
    np.testing.assert_array_equal(read, blocks.values(weight.shape).numpy())
    assert torch.equal(blocks.values(weight.shape)[0, :256], torch.zeros(256))


@pytest.mark.parametrize(("kind", "low", "high"), [("q4_k", 0.04, 0.08), ("q5_k", 0.02, 0.04), ("q6_k", 0.01, 0.022)])
def test_the_error_is_that_of_the_bits(kind, low, high) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 512)
    error = float((k_quant(weight, kind) - weight).norm() / weight.norm())
    assert low < error < high
    plain = {"q4_k": "q4_0", "q5_k": "q5_0"}.get(kind)
    if plain:  # of as many bits, without an offset
        assert error < float((gguf(weight, plain) - weight).norm() / weight.norm())
    assert k_quant(weight.bfloat16(), kind).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_chunks_change_nothing(kind, monkeypatch) -> None:
    weight = ragged().bfloat16()
    whole = k_quant(weight, kind)
    monkeypatch.setattr(k_quants, "CHUNK", 1100)  # two rows, and two
    assert torch.equal(k_quant(weight, kind), whole)


def test_what_the_format_holds_stays() -> None:
    weight = ragged()
    once = k_quant(weight, "q6_k")
    assert float((k_quant(once, "q6_k") - once).norm() / once.norm()) < 0.006


def test_q4_k_m_is_the_mixture_of_llama_quantize() -> None:
    more = [block for block in range(32) if kind_in_q4_k_m("mlp.down_proj", block, 32) == "q6_k"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert kind_in_q4_k_m("self_attn.v_proj", 6, 32) == "q6_k"
    assert kind_in_q4_k_m("self_attn.v_proj", 7, 32) == "q4_k"
    assert {kind_in_q4_k_m(f"self_attn.{n}_proj", 0, 32) for n in "qko"} == {"q4_k"}
    assert kind_in_q4_k_m("self_attn.qkv_proj", 9, 32) == "q5_k"


def test_a_width_that_is_no_multiple_of_256_falls_back_as_llama_quantize_does() -> None:
    torch.manual_seed(0)
    narrow, wide, odd = torch.randn(4, 576), torch.randn(4, 1536), torch.randn(4, 40)
    rounding = rounding_to("q4_k_m", True)
    few, more = Place("mlp.down_proj", 4, 32), Place("mlp.down_proj", 0, 32)
    assert torch.equal(rounding(narrow, few), gguf(narrow, "q5_0"))
    assert torch.equal(rounding(wide, few), k_quant(wide, "q4_k"))
    assert torch.equal(rounding(narrow, more), gguf(narrow, "q8_0"))
    assert torch.equal(rounding(wide, more), k_quant(wide, "q6_k"))
    assert rounding(odd, more) is None
