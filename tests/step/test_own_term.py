"""A kind of term that only its declaration and its execution know of: trained, cut into pieces, planned, reported,
exact in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_compare import relative_l2
from objective_runs import BATCH, BLOCKS, precise_model
from own_term import Small, SquaredNorm
from shape_recipes import recipe
from tiny_models import flat, gradients, runner_on
from tiny_run import TinyRun, rows, write_model

from repbend_fast.models import find_decoder
from repbend_fast.objectives import Stream, Term
from repbend_fast.objectives.custom import CustomObjectiveConfig
from repbend_fast.objectives.normalize import over_step
from repbend_fast.planning.planner import Planner
from repbend_fast.step.levers import Levers

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def stream() -> Stream:
    return Small({}, BLOCKS).streams(BATCH, 0)[0]


def oracle(model: Any) -> torch.Tensor:
    """The term's plain expression, one sequence at a time, unweighted."""
    values = []
    for sequence in stream().sequences:
        states = model(torch.tensor([sequence.ids]), output_hidden_states=True).hidden_states
        values += [states[layer][0, sequence.prompt_length :].square().mean(-1) for layer in LAYERS]
    return torch.cat(values).mean()


@pytest.mark.parametrize(
    ("piece_tokens", "packing", "blocks"), [(None, "off", 0), (13, "off", 0), (13, "on", 2), (1, "off", BLOCKS)]
)
def test_value_and_gradient_are_the_plain_expression_s_whatever_the_pieces(
    precise: Any, piece_tokens: int | None, packing: Any, blocks: int
) -> None:
    precise.zero_grad(set_to_none=True)
    expected = oracle(precise)
    (expected * 2.0).backward()
    wanted = flat(gradients(precise))
    precise.zero_grad(set_to_none=True)
    runner = runner_on(
        precise, Levers({"shrunk": piece_tokens} if piece_tokens else {}, blocks, packing=packing), uses_head=False
    )
    result = runner.backward(stream(), dropout_seed=0)
    got = flat(gradients(precise))
    assert relative_l2(got, wanted) < 1e-10
    for wrong in (torch.zeros_like(got), -got, got.roll(1)):
        assert relative_l2(wrong, wanted) > 0.1
    assert float(result.terms["short"]) == pytest.approx(float(expected), rel=1e-12)
    assert float(result.loss) == pytest.approx(2 * float(expected), rel=1e-6)
    assert result.layers == {}


def test_its_denominator_may_be_the_optimizer_step_s(precise: Any) -> None:
    whole = stream()
    halves = [
        Stream("shrunk", (sequence,), (SquaredNorm("short", LAYERS, (span,), 2.0, 2 * (span[1] - span[0])),))
        for sequence, span in zip(whole.sequences, whole.terms[0].spans, strict=True)
    ]
    runner = runner_on(precise, Levers({}, 0, packing="off"), uses_head=False)
    found = sum(float(runner.measure(s).terms["short"]) for (s,) in over_step([[half] for half in halves])) / len(
        halves
    )
    assert found == pytest.approx(float(runner.measure(whole).terms["short"]), rel=1e-12)


def test_it_trains_and_is_reported(tmp_path: Path) -> None:
    run = TinyRun(write_model(tmp_path / "model"), tmp_path)
    settings = (
        "objective={name: 'own_term:Small'}",
        "training.steps=6",
        "training.learning_rate=0.01",
        "validation.every=3",
        "output.report=true",
    )
    assert run.train(*settings).exit_code == 0
    values = [row["terms"]["short"] for row in rows(run.path, "step")]
    assert len(values) == 6
    assert values[-1] < values[0]
    checks = rows(run.path, "validation")
    assert [row["probes"] for row in checks] == [["moved", None]] * len(checks)
    assert checks[-1]["distance"]["moved"]["2"] > 0
    assert "own_term:Small" in (run.path / "report.html").read_text(encoding="utf-8")


def test_it_is_planned(tmp_path: Path) -> None:
    config = recipe(tmp_path).model_copy(update={"objective": CustomObjectiveConfig(name="own_term:Small")})
    planner = Planner(config, torch.device("cpu"))
    plan = planner.plan(None)
    assert set(plan.streams) == {"shrunk"}
    assert plan.streams["shrunk"] > 0
    size, _ = planner.smallest()
    assert size < plan.total
    assert planner.plan(int(1.05 * size)).total <= 1.05 * size


def test_a_kind_without_an_execution_is_named(precise: Any) -> None:
    class Unknown(Term):
        name, weight, layers, spans = "odd", 1.0, (1,), ((0, 1),)  # type: ignore[assignment]

    sequences = stream().sequences[:1]
    runner = runner_on(precise, Levers({}, 0, packing="off"), uses_head=False)
    with pytest.raises(TypeError, match="term odd: nothing says how a Unknown is computed"):
        runner.measure(Stream("s", sequences, (Unknown(),)))
    assert find_decoder(precise).num_blocks == BLOCKS
