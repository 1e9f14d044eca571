"""Each example runs on a CPU, and its term is the expression that it replaces."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_compare import assert_matches

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports an example by name, as running it would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # Models and optimizers allocate on purpose what they fill later.
    torch.use_deterministic_algorithms(False)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_trainer_subclass_lowers_its_loss(example) -> None:
    losses = example("trainer_with_repbend_term").main(steps=8)
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_circuit_breakers_terms_are_the_published_block(example) -> None:
    module, tiny = example("circuit_breakers_loop"), example("tiny_model")
    model = tiny.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    retain, forget = tiny.batch(1), tiny.batch(2)
    got = module.terms(model, retain, forget)
    hidden = torch.stack(list(module.states(model, retain[0])))
    reference = torch.stack(list(module.reference_states(model, retain[0])))
    norms = torch.norm(hidden - reference, dim=-1)
    assert_matches(got[0], norms[:, retain[1]].mean().double(), tolerance=1e-5)
    turned = [
        torch.cosine_similarity(h, r, dim=-1).relu()[forget[1]]
        for h, r in zip(module.states(model, forget[0]), module.reference_states(model, forget[0]))
    ]
    assert_matches(
        got[1], torch.stack([turned[layer] for layer in module.TARGET_LAYERS]).mean().double(), tolerance=1e-5
    )


def test_circuit_breakers_loop_turns_forget_states_away(example) -> None:
    history = example("circuit_breakers_loop").main(steps=8)
    assert history[0][0] == 0.0
    assert history[0][1] == pytest.approx(1.0, abs=1e-5)
    assert history[-1][1] < 0.7


def test_distillation_keeps_the_distribution(example) -> None:
    module = example("distill_from_own_base")
    kept, free = module.main(steps=10), module.main(steps=10, kl_weight=0.0)
    assert kept[0][1] == 0.0
    assert kept[-1][0] < kept[0][0]
    assert kept[-1][1] < 0.7 * free[-1][1]
