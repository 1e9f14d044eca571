"""GPT-2's linear layers, whose weights are [inputs, outputs]: adapted, merged, rounded, and with parts on top."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_families import other_model

from repbend_fast.config.schema import LoraConfig
from repbend_fast.models import attach_lora, find_decoder
from repbend_fast.models.layers.rounded import rounded_weights
from repbend_fast.models.layers.stacked import StackedLora

IDS = torch.arange(3, 12)[None]
MATRICES = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def adapted() -> Any:
    model = attach_lora(other_model("gpt2"), LoraConfig(r=2, dropout=0.0), (2,))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_merge_is_the_adapted_model(adapted) -> None:
    expected = _logits(adapted)
    assert not torch.allclose(expected, _logits(other_model("gpt2")), atol=0.1)
    torch.testing.assert_close(_logits(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_rounding_sees_outputs_by_inputs_and_gives_every_weight_back(adapted) -> None:
    seen: set[tuple[int, ...]] = set()

    def halved(weight: torch.Tensor, place: object) -> torch.Tensor:
        seen.add(tuple(weight.shape))
        return weight / 2

    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    expected = _logits(adapted)
    with rounded_weights(adapted, find_decoder(adapted).layers, halved, adapter=True) as count:
        assert (count.weights, count.rounded) == (MATRICES, MATRICES)
        assert not torch.allclose(_logits(adapted), expected, atol=0.1)
    assert seen == {(192, 64), (64, 64), (256, 64), (64, 256)}
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert torch.equal(_logits(adapted), expected)


def test_low_rank_parts_on_top_reach_every_layer() -> None:
    model = other_model("gpt2")
    parts = StackedLora(find_decoder(model).layers, rank=2, alpha=4.0, seed=0)
    assert len(parts.parameters) == 2 * 2 * 4
    assert [tuple(p.shape) for p in parts.parameters[:2]] == [(2, 64), (192, 2)]
    before = _logits(model)
    with parts.on():
        assert torch.equal(_logits(model), before)
        torch.nn.init.normal_(parts.parameters[1], std=0.1)
        assert not torch.allclose(_logits(model), before, atol=1e-3)
