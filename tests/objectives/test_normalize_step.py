"""Denominators over the whole optimizer step: however its examples are dealt to micro-batches, the gradient is the
same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compare import relative_l2
from objective_runs import CONFIGS, STEPS, precise_model
from refuse_and_reroute import RefuseAndReroute
from tiny_models import flat, gradients, pair, runner_on, sequence

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.models import find_decoder
from repbend_fast.objectives import Stream, build_objective
from repbend_fast.objectives.normalize import over_step
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.step.levers import Levers

TOLERANCE = 1e-10
LENGTHS = ((3, 2), (5, 9), (8, 4), (4, 13))
WHOLE = Batch(
    safe=tuple(sequence(p, a, 10 + i) for i, (p, a) in enumerate(LENGTHS)),
    unsafe=tuple(sequence(p + 1, a + 1, 20 + i) for i, (p, a) in enumerate(LENGTHS)),
    pairs=tuple(pair(p, a, a + i, 30 + i) for i, (p, a) in enumerate(LENGTHS)),
    retain=tuple(Sequence(sequence(p, a, 40 + i).ids, 0) for i, (p, a) in enumerate(LENGTHS)),
)
REPBEND = RepBendConfig(window_start=2, window_size=2, pair=0.4, cosine=0.0)
CASES: dict[str, Any] = {
    **{
        f"repbend {m}": REPBEND.model_copy(update={"loss_mode": m})
        for m in ("prompt_last", "prompt_all", "prompt_response", "response_all")
    },
    "repbend window, per token": REPBEND.model_copy(update={"alpha_mode": "target", "kl_reduction": "token"}),
    "repbend limit": REPBEND.model_copy(update={"unsafe_limit": 0.05}),
    # Of all pairs: which of some are chosen is drawn for each micro-batch.
    "repbend refusal": REPBEND.model_copy(update={"refusal": 30.0, "recovery_tokens": 4, "recovery_share": 1.0}),
    "circuit_breaker": CONFIGS["circuit_breaker"],
    "circuit_breaker published": CONFIGS["circuit_breaker"].model_copy(
        update={"published_quirks": True, "padded_length": 31}
    ),
    "rmu": CONFIGS["rmu"],
    "rmu published": CONFIGS["rmu"].model_copy(update={"published_quirks": True, "padded_length": 40}),
    "npo": CONFIGS["npo"],
    "npo published": CONFIGS["npo"].model_copy(update={"published_quirks": True}),
    "own": {"layers": [2, 3]},
}


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def _dealt(examples: int) -> list[Batch]:
    """``WHOLE`` in micro-batches of ``examples`` per role."""
    roles = (WHOLE.safe, WHOLE.unsafe, WHOLE.pairs, WHOLE.retain)
    return [Batch(*(role[i : i + examples] for role in roles)) for i in range(0, 4, examples)]


def _streams(model: Any, config: Any, batches: list[Batch], normalize: str) -> list[list[Stream]]:
    blocks = find_decoder(model).num_blocks
    objective = RefuseAndReroute(config, blocks) if isinstance(config, dict) else build_objective(config, blocks, STEPS)
    streams = [objective.streams(batch, 2) for batch in batches]
    return over_step(streams) if normalize == "step" else streams


def _step(model: Any, config: Any, batches: list[Batch], normalize: str) -> tuple[dict[str, float], torch.Tensor]:
    """The step's terms as they are logged, the mean of the micro-batches', and its gradient."""
    model.zero_grad(set_to_none=True)
    runner = runner_on(model, Levers({}, 0, packing="off"), uses_head=True)  # type: ignore[arg-type]
    terms: dict[str, float] = {}
    for streams in _streams(model, config, batches, normalize):
        for stream in streams:
            result = runner.backward(stream, 1 / len(batches), dropout_seed=0)
            values = {**result.terms, "loss": result.loss}
            values |= {f"{n} {layer}": v for n, by_layer in result.layers.items() for layer, v in by_layer.items()}
            for name, value in values.items():
                terms[name] = terms.get(name, 0.0) + float(value) / len(batches)
    return terms, flat(gradients(model))


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_one_gradient_however_the_examples_are_dealt(precise, config) -> None:
    terms, expected = _step(precise, config, [WHOLE], "micro_batch")
    assert torch.isfinite(expected).all()
    for examples in (1, 2, 4):
        found, got = _step(precise, config, _dealt(examples), "step")
        assert relative_l2(got, expected) < TOLERANCE
        for wrong in (torch.zeros_like(got), -got, got.roll(1)):
            assert relative_l2(wrong, expected) > 0.1
        assert found == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize(
    "config", [CASES["repbend response_all"], CASES["circuit_breaker"], CASES["rmu"], CASES["own"]]
)
def test_the_published_mean_of_means_depends_on_the_dealing(precise, config) -> None:
    """Otherwise the lengths above would test nothing."""
    _, whole = _step(precise, config, [WHOLE], "micro_batch")
    _, single = _step(precise, config, _dealt(1), "micro_batch")
    assert relative_l2(single, whole) > 0.05


def test_micro_batches_without_rows_of_a_term(precise) -> None:
    """The pair term has none in the first, and its denominator there, which is 1 to divide by, does not count."""
    whole = Batch(safe=WHOLE.safe[:1], unsafe=WHOLE.unsafe[:2], pairs=WHOLE.pairs[:1], retain=WHOLE.retain[:2])
    dealt = [
        Batch(safe=WHOLE.safe[:1], unsafe=WHOLE.unsafe[:1], retain=WHOLE.retain[:1]),
        Batch(unsafe=WHOLE.unsafe[1:2], pairs=WHOLE.pairs[:1], retain=WHOLE.retain[1:2]),
    ]
    _, expected = _step(precise, REPBEND, [whole], "micro_batch")
    _, got = _step(precise, REPBEND, dealt, "step")
    assert relative_l2(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["crl", "repbend"])
def test_what_couples_a_micro_batch_stays_within_it(precise, name) -> None:
    """CRL's mean state and the pairwise cosine: CRL's sums are divided by the step's rows, the cosine stays a mean of
    means.
    """
    config = CONFIGS["crl"] if name == "crl" else REPBEND.model_copy(update={"cosine": 0.7, "pair": 0.0})
    plain = _streams(precise, config, _dealt(2), "micro_batch")
    runner = runner_on(precise, Levers({}, 0, packing="off"), uses_head=True)  # type: ignore[arg-type]
    terms = [{k: float(v) for s in streams for k, v in runner.measure(s).terms.items()} for streams in plain]
    found, _ = _step(precise, config, _dealt(2), "step")
    if name == "crl":
        for half in ("safe", "unsafe"):
            counts = [getattr(streams[0].terms[0], half).denominator for streams in plain]
            mean = sum(t[half] * d for t, d in zip(terms, counts, strict=True)) / sum(counts)
            assert counts[0] != counts[1]
            assert found[half] == pytest.approx(mean, rel=1e-6)
    else:
        assert found["cosine"] == pytest.approx(sum(t["cosine"] for t in terms) / 2, rel=1e-6)
        assert found["unsafe"] != pytest.approx(sum(t["unsafe"] for t in terms) / 2, rel=1e-3)


def test_terms_of_one_name_are_told_apart_by_their_order(precise) -> None:
    streams = _streams(precise, REPBEND, _dealt(2), "micro_batch")
    twice = [[*s, *s] for s in streams]
    once, both = over_step(streams), over_step(twice)
    assert both == [[*s, *s] for s in once]
