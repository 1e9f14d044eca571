"""Both sides of what can be named: a run, its checkpoint, an adapter on a model, an adapter alone, a model alone."""

from __future__ import annotations

import pytest
import torch
from tiny_run import TinyRun
from transformers import AutoModelForCausalLM

from repbend_fast.errors import UserError
from repbend_fast.models.decoder import causal_model
from repbend_fast.serving.loaded import Sides, load_sides

IDS = torch.tensor([[5, 9, 30, 41]])


def logits(sides: Sides, side: str) -> torch.Tensor:
    with sides.on(side) as model:
        found: torch.Tensor = causal_model(model)(IDS).logits
    assert not found.requires_grad
    return found


def test_the_base_is_the_model_as_it_was_and_the_bent_side_the_adapter(whole: TinyRun) -> None:
    plain = AutoModelForCausalLM.from_pretrained(str(whole.model), dtype=torch.float32)
    with torch.no_grad():
        expected = plain(IDS).logits
    adapter = str(whole.path / "adapter")
    checkpoint = str(sorted((whole.path / "checkpoints").iterdir())[-1])
    named = {
        "run": load_sides(str(whole.path)),
        "adapter on a model": load_sides(str(whole.model), adapter, ["model.dtype=float32"]),
        "adapter alone": load_sides(adapter, None, {"model.dtype": "float32"}),
        "checkpoint": load_sides(checkpoint),
    }
    bent = {name: logits(sides, "bent") for name, sides in named.items()}
    for name, sides in named.items():
        assert sides.names == ("base", "bent"), name
        torch.testing.assert_close(logits(sides, "base"), expected)
        assert (bent[name] - expected).abs().max() > 1e-4, name
        # Asking as base leaves the adapter on.
        assert torch.equal(logits(sides, "bent"), bent[name])
    torch.testing.assert_close(bent["adapter on a model"], bent["run"])
    torch.testing.assert_close(bent["adapter alone"], bent["run"])


def test_a_model_alone_is_one_side(whole: TinyRun) -> None:
    sides = load_sides(str(whole.model), overrides={"model.dtype": "float32"})
    assert (sides.names, sides.adapter, sides.positions) == (("base",), None, 512)
    with pytest.raises(UserError, match="no run, model, recipe or hub name"):
        load_sides("nothing-of-that-name")
