"""Logits of families that scale them: every term that reads the head gives what it would on the model's own logits."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from other_families import other_model
from repbend_kernels import linear_kl_div, linear_log_prob
from tiny_models import flat, run_step, wrap

from repbend_fast.models import find_decoder, find_head
from repbend_fast.objectives.repbend import RepBendConfig

PACKAGE = Path(__file__).parents[2] / "repbend_fast"
IDS = torch.arange(3, 12)[None]


def _readers() -> dict[str, str]:
    """Sources that give the head's weight to an op."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            reads = any(ast.unparse(argument).startswith("head.weight") for argument in node.args)
            if reads and ast.unparse(node.func).rpartition(".")[2].startswith("linear"):
                found[f"{path.relative_to(PACKAGE)}:{node.lineno}"] = ast.unparse(node)
    return found


def test_no_reader_of_the_head_leaves_its_scale_out() -> None:
    readers = _readers()
    assert len(readers) >= 6
    text = "head.inputs("
    chat = [place for place, call in readers.items() if text not in call]
    assert all(place.startswith("evaluation/chat.py") for place in chat), chat
    assert (PACKAGE / "evaluation" / "chat.py").read_text(encoding="utf-8").count(text) == 2


@pytest.mark.parametrize(
    ("family", "settings"), [("granite", {"logits_scaling": 4.0}), ("minicpm3", {}), ("cohere", {})]
)
def test_the_head_gives_the_models_own_probabilities(family: str, settings: dict[str, float]) -> None:
    model = other_model(family, **settings)
    head = find_head(model)
    assert head.scale is not None
    with torch.no_grad():
        hidden = find_decoder(model).body(input_ids=IDS, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=IDS, use_cache=False).logits[0]
    got = linear_log_prob(head.inputs(hidden[:-1]), head.weight, IDS[0, 1:])
    expected = logits[:-1].log_softmax(-1).gather(-1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    other = hidden.roll(1, 0)
    kl = linear_kl_div(head.inputs(other), head.inputs(hidden), head.weight, reduction="sum")
    own = torch.nn.functional.kl_div(
        logits.roll(1, 0).log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(kl, own, rtol=1e-4, atol=1e-5)


def test_a_step_s_gradient_through_a_scaled_head_is_that_of_a_scaled_weight() -> None:
    """Logits divided by 4 are those of a head with a quarter of the weights."""
    config = RepBendConfig(window_start=1, window_size=2)
    scaled, plain = other_model("granite", logits_scaling=4.0), other_model("granite")
    plain.lm_head.weight.data = plain.lm_head.weight.data.clone() / 4.0
    plain.model.embed_tokens.weight.data = scaled.model.embed_tokens.weight.data.clone()
    (first, got), (second, expected) = (run_step(wrap(model), config, only="retain") for model in (scaled, plain))
    torch.testing.assert_close(flat(got), flat(expected), rtol=1e-5, atol=1e-8)
    assert float(flat(expected).norm()) > 0
    assert float(first["retain"].loss) == pytest.approx(float(second["retain"].loss), rel=1e-5)
