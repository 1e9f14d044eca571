"""What each objective declares: sequences, rows, weights by step, denominators, and how far its passes go."""

from __future__ import annotations

import math

import pytest
import torch
from objective_runs import BATCH, CONFIGS, run_objective
from tiny_models import WITHOUT_DROPOUT, adapted_model, flat

from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.objectives import Direction, Stream, build_objective, roles_of
from repbend_fast.objectives.ce_u import CEUConfig
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.rmu import RMUConfig
from repbend_fast.objectives.sat_imp import WGAConfig
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.objectives.undial import UNDIALConfig
from repbend_fast.objectives.x_boundary import XBoundaryConfig
from repbend_fast.step.terms.distance import fixed_row

BLOCKS = 32
# Lengths (prompt, answer) of unsafe sequences, then of the pairs' unsafe halves; and of the retain conversations.
FORGET = [(4, 7), (9, 5), (6, 5), (3, 6)]
SAFE = [(5, 4), (7, 3), (6, 8), (3, 2)]
RETAIN = [12, 6]


def _streams(config: MethodConfig, step: int = 0, steps: int = 150, batch: Batch = BATCH) -> dict[str, Stream]:
    return {s.name: s for s in build_objective(config, BLOCKS, steps).streams(batch, step)}


@pytest.mark.parametrize("name", ["circuit_breaker", "rmu", "npo", "simnpo", "wga", "sat_imp", "undial", "ce_u"])
def test_forget_is_unsafe_and_the_unsafe_halves_of_pairs(name) -> None:
    streams = _streams(CONFIGS[name])
    assert streams["forget"].sequences == (*BATCH.unsafe, *(p.unsafe for p in BATCH.pairs))
    assert streams["retain"].sequences == BATCH.retain


def test_circuit_breakers() -> None:
    streams = _streams(CircuitBreakerConfig(), step=74)
    (forget,), (retain,) = streams["forget"].terms, streams["retain"].terms
    assert (forget.kind, forget.layers, forget.weight) == ("relu_cosine", (10, 20), 7.5)
    assert forget.spans == tuple((0, p + a) for p, a in FORGET)
    assert forget.denominator == 2 * sum(p + a for p, a in FORGET)
    assert (retain.kind, retain.layers, retain.weight) == ("l2", tuple(range(1, 33)), 2.5)
    assert retain.denominator == 33 * sum(RETAIN)
    assert [s.stop(BLOCKS) for s in streams.values()] == [20, 32]
    assert _streams(CircuitBreakerConfig(published_quirks=True))["retain"].terms[0].denominator == 33 * 2 * 1024
    quirky = CircuitBreakerConfig(published_quirks=True, padded_length=None)
    assert _streams(quirky)["retain"].terms[0].denominator == 33 * 2 * 12


@pytest.mark.parametrize(("config", "layers"), [(CircuitBreakerConfig, 2), (RMUConfig, 1)])
def test_forgetting_answers_alone_keeps_all_rows_of_retain(config, layers) -> None:
    streams = _streams(config(loss_mode="response_all"))
    (forget,), (retain,) = streams["forget"].terms, streams["retain"].terms
    assert forget.spans == tuple((p, p + a) for p, a in FORGET)
    assert forget.denominator == layers * sum(a for _, a in FORGET)
    assert retain.spans == tuple((0, n) for n in RETAIN)


@pytest.mark.parametrize(
    ("step", "steps", "own", "progress"),
    [(0, 150, None, 1 / 300), (149, 150, None, 0.5), (9, 150, 10, 0.5), (99, 9, 10, 1)],
)
def test_circuit_breakers_coefficients(step, steps, own, progress) -> None:
    streams = _streams(CircuitBreakerConfig(schedule_steps=own), step, steps)
    assert streams["forget"].terms[0].weight == pytest.approx(10 * (1 - progress))
    assert streams["retain"].terms[0].weight == pytest.approx(10 * progress)


def test_x_boundary() -> None:
    streams = _streams(XBoundaryConfig(), step=74)
    (erase,), (boundary,), (retain,) = (streams[name].terms for name in ("erase", "boundary", "retain"))
    assert streams["erase"].sequences == BATCH.unsafe
    assert streams["boundary"].sequences == tuple(p.unsafe for p in BATCH.pairs)
    assert boundary.against == tuple(p.safe for p in BATCH.pairs)
    assert streams["retain"].sequences == (*BATCH.retain, *(p.safe for p in BATCH.pairs))
    assert erase.spans == tuple((0, p + a) for p, a in FORGET[:2])
    assert boundary.spans == tuple((0, p) for p, _ in FORGET[2:])
    both = sum(p + a for p, a in FORGET[:2]) + sum(p for p, _ in FORGET[2:])
    assert erase.denominator == boundary.denominator == 2 * both
    assert erase.layers == boundary.layers == (10, 20)
    assert erase.weight == boundary.weight == pytest.approx(10 * (1 - 75 / 150))
    assert retain.weight == pytest.approx(10 * 75 / 150)
    assert retain.denominator == 33 * (sum(RETAIN) + sum(p + a for p, a in SAFE[2:]))
    assert [s.stop(BLOCKS) for s in streams.values()] == [20, 20, 32]
    assert [s.reference_stop(BLOCKS) for s in streams.values()] == [20, 20, 32]
    quirky = XBoundaryConfig(published_quirks=True, padded_length=None)
    assert _streams(quirky)["retain"].terms[0].denominator == 33 * 4 * 14
    last = _streams(XBoundaryConfig(), step=149)
    assert last["erase"].terms[0].weight == last["boundary"].terms[0].weight == 0.0
    assert list(_streams(XBoundaryConfig(), batch=Batch(unsafe=BATCH.unsafe, retain=BATCH.retain))) == [
        "erase",
        "retain",
    ]


def test_circuit_breakers_schedule_needs_a_length() -> None:
    with pytest.raises(ValueError, match="steps"):
        build_objective(CircuitBreakerConfig(), BLOCKS)
    assert build_objective(CircuitBreakerConfig(schedule_steps=3), BLOCKS)


def test_rmu() -> None:
    streams = _streams(RMUConfig())
    (forget,), (retain,) = streams["forget"].terms, streams["retain"].terms
    assert (forget.kind, forget.layers, forget.weight, forget.target) == ("mse", (8,), 1.0, Direction(42, 6.5))
    assert (retain.kind, retain.layers, retain.weight, retain.target) == ("mse", (8,), 1200.0, None)
    assert (forget.denominator, retain.denominator) == (sum(p + a for p, a in FORGET), sum(RETAIN))
    assert [s.stop(BLOCKS) for s in streams.values()] == [8, 8]
    assert [s.reference_stop(BLOCKS) for s in streams.values()] == [0, 8]
    quirky = _streams(RMUConfig(published_quirks=True))
    assert [s.terms[0].denominator for s in quirky.values()] == [4 * 14, 2 * 12]
    assert list(_streams(RMUConfig(retain=0.0), batch=Batch(unsafe=BATCH.unsafe))) == ["forget"]


def test_npo() -> None:
    streams = _streams(NPOConfig(retain_nll=1.0, retain_kl=0.1))
    loss = streams["forget"].term("forget")
    assert (loss.beta, loss.weight, loss.denominator) == (0.1, 1.0, 4)
    assert loss.spans == tuple((p - 1, p + a - 1) for p, a in FORGET)
    kl, nll = streams["retain"].term("kl"), streams["retain"].term("nll")
    assert kl.spans == nll.spans == tuple((0, n - 1) for n in RETAIN)
    assert kl.denominator == nll.denominator == sum(RETAIN) - 2
    assert nll.beta is None
    assert _streams(NPOConfig(retain_kl=0.1, published_quirks=True))["retain"].term("kl").spans == tuple(
        (0, n) for n in RETAIN
    )
    assert list(_streams(NPOConfig())) == ["forget"]
    assert _streams(NPOConfig(retain_nll=1.0))["retain"].reference_stop(BLOCKS) == 0
    assert streams["forget"].reference_stop(BLOCKS) == BLOCKS


def test_undial_and_ce_u() -> None:
    streams = _streams(UNDIALConfig())
    assert list(streams) == ["forget"]
    term = streams["forget"].term("forget")
    assert term.spans == tuple((p - 1, p + a - 1) for p, a in FORGET)
    assert (term.lowered, term.own, term.weight, term.denominator) == (10.0, False, 1.0, sum(a for _, a in FORGET))
    assert streams["forget"].reference_stop(BLOCKS) == BLOCKS
    (own,) = _streams(CEUConfig())["forget"].terms
    assert own.spans == tuple((p, p + a - 1) for p, a in FORGET)
    assert (own.lowered, own.own, own.denominator) == (math.inf, True, sum(a - 1 for _, a in FORGET))
    assert _streams(CEUConfig())["forget"].reference_stop(BLOCKS) == 0
    (empty,) = _streams(CEUConfig(skipped_tokens=99))["forget"].terms
    assert (empty.rows_of(), empty.denominator) == (0, 1)


def test_crl() -> None:
    streams = _streams(CRLConfig())
    stream, term = streams["triplet"], streams["triplet"].terms[0]
    assert stream.sequences == (
        *BATCH.safe,
        *(p.safe for p in BATCH.pairs),
        *BATCH.unsafe,
        *(p.unsafe for p in BATCH.pairs),
    )
    assert term.safe.spans == (*((p, p + a) for p, a in SAFE), *[(0, 0)] * 4)
    assert term.unsafe.spans == (*[(0, 0)] * 4, *((p, p + a) for p, a in FORGET))
    assert (term.safe.layers, term.unsafe.layers) == (tuple(range(33)), tuple(range(20, 31)))
    assert (term.safe.denominator, term.unsafe.denominator) == (
        33 * sum(a for _, a in SAFE),
        11 * sum(a for _, a in FORGET),
    )
    assert (term.safe.weight, term.unsafe.weight, term.safe.margin, term.unsafe.margin) == (0.5, 0.6, 2.0, 3.0)
    assert streams["retain"].weights == {"kl": 0.7}
    assert streams["triplet"].weights == {"safe": 0.5, "unsafe": 0.6}
    narrow = _streams(CRLConfig(alpha_mode="target", kl=0.0))
    assert list(narrow) == ["triplet"]
    assert narrow["triplet"].stop(BLOCKS) == 30


@pytest.mark.parametrize(
    ("config", "roles"),
    [
        (CircuitBreakerConfig(), {"unsafe", "pair", "retain"}),
        (RMUConfig(), {"unsafe", "pair", "retain"}),
        (RMUConfig(retain=0.0), {"unsafe", "pair"}),
        (NPOConfig(), {"unsafe", "pair"}),
        (NPOConfig(retain_nll=1.0), {"unsafe", "pair", "retain"}),
        (WGAConfig(), {"unsafe", "pair", "retain"}),
        (WGAConfig(retain_nll=0.0), {"unsafe", "pair"}),
        (WGAConfig(retain_nll=0.0, retain_kl=1.0), {"unsafe", "pair", "retain"}),
        (XBoundaryConfig(), {"unsafe", "pair", "retain"}),
        (CRLConfig(), {"safe", "unsafe", "pair", "retain"}),
        (CRLConfig(safe=0.0, kl=0.0), {"unsafe", "pair"}),
    ],
)
def test_roles(config, roles) -> None:
    assert set(roles_of(config)) == roles == set(build_objective(config, BLOCKS, 1).roles)


@pytest.mark.parametrize(
    ("config", "text"),
    [(CircuitBreakerConfig(layers=[3, 40]), "objective.layers"), (RMUConfig(layer=33), "layer=33")],
)
def test_layers_that_the_model_lacks(config, text) -> None:
    with pytest.raises(UserError, match=text) as caught:
        build_objective(config, BLOCKS, 1)
    assert "hidden states 0 … 32" in str(caught.value)


def test_the_fixed_direction_is_the_same_everywhere() -> None:
    rows = [
        fixed_row(Direction(7, 6.5), torch.empty(2, 48, dtype=dtype))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    torch.rand(5)
    again = fixed_row(Direction(7, 6.5), torch.empty(3, 48, dtype=torch.float64))
    assert torch.equal(rows[0], again)
    assert rows[0].shape == (1, 48)
    assert float(rows[0].norm()) == pytest.approx(6.5)
    assert float(rows[0].min()) >= 0
    for row in rows[1:]:
        assert torch.equal(row, rows[0].to(row.dtype))
    assert not torch.equal(again, fixed_row(Direction(8, 6.5), torch.empty(1, 48, dtype=torch.float64)))


def test_a_term_without_a_reference_runs_no_reference_pass(monkeypatch) -> None:
    passes = []
    from repbend_fast.step import reference

    run = reference.run_decoder
    monkeypatch.setattr(
        reference, "run_decoder", lambda *args, **kwargs: passes.append(kwargs["stop"]) or run(*args, **kwargs)
    )
    model = adapted_model()
    run_objective(model, CONFIGS["rmu"])
    assert passes == [2]
    passes.clear()
    run_objective(model, NPOConfig(retain_nll=1.0))
    assert passes == [4]


@pytest.mark.parametrize(
    ("name", "moves"), [("circuit_breaker", False), ("rmu", True), ("npo", True), ("crl", True), ("x_boundary", True)]
)
def test_what_starts_the_training(name, moves) -> None:
    """At B = 0 Circuit Breakers has no gradient beyond rounding; the others have one."""
    model = adapted_model(lora=WITHOUT_DROPOUT, trained=False)
    results, gradient = run_objective(model, CONFIGS[name])
    assert float(flat(gradient).norm()) > 1e-3 if moves else float(flat(gradient).norm()) < 1e-5
    assert torch.isfinite(flat(gradient)).all()
    terms = {n: float(v) for r in results for n, v in r.terms.items()}
    assert {
        "circuit_breaker": terms.get("retain"),
        "rmu": terms.get("retain"),
        "npo": terms.get("kl"),
        "crl": terms.get("kl"),
        "x_boundary": terms.get("retain"),
    }[name] < 1e-6
