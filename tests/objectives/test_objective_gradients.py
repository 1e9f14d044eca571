"""Losses and gradients of each objective against its plain expression in float64, and the same however a
stream is cut.
"""

from __future__ import annotations

from typing import Any

import objective_oracles as oracles
import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import BATCH, BLOCKS, CONFIGS, STEP, STEPS, plain_terms, precise_model, run_objective
from tiny_models import LAYOUTS, WITHOUT_DROPOUT, flat, gradients

from repbend_fast.objectives.ce_u import CEUConfig
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.rmu import RMUConfig
from repbend_fast.objectives.sat_imp import SatImpConfig, WGAConfig
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.objectives.simnpo import SimNPOConfig
from repbend_fast.objectives.undial import UNDIALConfig
from repbend_fast.objectives.x_boundary import XBoundaryConfig

# The KL op evaluates small differences by a series, to 1e-9.
TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def _joint(
    model: Any, config: MethodConfig, step: int = STEP
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    terms = plain_terms(model, config, step)
    torch.stack(list(terms.values())).sum().backward()
    return {name: value.detach() for name, value in terms.items()}, gradients(model)


CASES = {
    **CONFIGS,
    "circuit_breaker published": CONFIGS["circuit_breaker"].model_copy(
        update={"published_quirks": True, "padded_length": 31}
    ),
    "circuit_breaker last state": CircuitBreakerConfig(layers=[BLOCKS]),
    "circuit_breaker answers": CONFIGS["circuit_breaker"].model_copy(update={"loss_mode": "response_all"}),
    "rmu answers": CONFIGS["rmu"].model_copy(update={"loss_mode": "response_all"}),
    "rmu published": CONFIGS["rmu"].model_copy(update={"published_quirks": True}),
    "rmu published, padded": CONFIGS["rmu"].model_copy(update={"published_quirks": True, "padded_length": 40}),
    "rmu without retain": RMUConfig(layer=2, retain=0.0, direction_seed=5),
    "npo alone": NPOConfig(beta=0.3),
    "npo kl": NPOConfig(retain_kl=0.4, temperature=1.5),
    "npo published": NPOConfig(retain_kl=0.4, retain_nll=1.0, published_quirks=True),
    "simnpo alone": SimNPOConfig(beta=0.3, delta=3.0, retain_nll=0.0, forget=2.0),
    "wga as published": WGAConfig(),
    "sat_imp as published": SatImpConfig(forget=1e8),  # p⁵ of a random model is small
    "x_boundary published": XBoundaryConfig(layers=[2, BLOCKS], published_quirks=True, padded_length=40),
    "x_boundary answers": XBoundaryConfig(layers=[1, 2], loss_mode="response_all", boundary_mode="response_all"),
    "undial as published": UNDIALConfig(),
    "undial kl": UNDIALConfig(strength=3.0, retain_kl=0.4, temperature=1.5),
    "ce_u kl": CEUConfig(retain_kl=0.4),
    "simnpo both": SimNPOConfig(beta=0.6, delta=4.0, retain_kl=0.4),
    "sat_imp both": SatImpConfig(power=0.8, rest_power=2.0, retain_kl=0.4),
    "ce_u whole answers": CEUConfig(skipped_tokens=0),
    "crl window": CONFIGS["crl"].model_copy(
        update={"alpha_mode": "target", "loss_mode": "prompt_response", "kl_reduction": "token"}
    ),
    "crl small margins": CONFIGS["crl"].model_copy(update={"safe_margin": 0.3, "unsafe_margin": 0.02}),
    "crl cosine": CRLConfig(
        window_start=2, window_size=2, distance="cosine", safe_margin=0.3, unsafe_margin=0.02, distance_unit="reference"
    ),
    "crl unsafe alone": CRLConfig(safe=0.0, kl=0.0, window_start=2, window_size=2, unsafe_margin=0.02),
    "crl safe alone": CRLConfig(unsafe=0.0, kl=0.0, window_start=2, window_size=2, safe_margin=0.0),
}


@pytest.mark.parametrize("pieces", [None, 24], ids=["one piece", "split"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_terms_and_gradient_equal_the_plain_expression(precise, config, pieces) -> None:
    terms, expected = _joint(precise, config)
    results, got = run_objective(precise, config, piece_tokens=pieces)
    found = {name: value for result in results for name, value in result.terms.items()}
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    assert found.keys() == terms.keys()
    for name, value in terms.items():
        assert abs(value.item()) > 1e-4, name  # an ascent is below 0
        assert_matches(found[name] * weights[name], value, tolerance=TOLERANCE, name=name)
    assert_matches(
        sum(r.loss for r in results), torch.stack(list(terms.values())).sum(), tolerance=TOLERANCE, name="loss"
    )
    assert_matches(flat(got), flat(expected), tolerance=TOLERANCE, name="gradient")
    for wrong in (torch.zeros_like(flat(got)), -flat(got), flat({n: g.roll(1, dims=0) for n, g in got.items()})):
        assert relative_l2(wrong, flat(expected)) > 0.1


def test_small_margins_leave_some_triplets_inactive(precise) -> None:
    """Otherwise the cases above would not test the relu."""
    config = CASES["crl small margins"]
    values = oracles.crl(precise, BATCH, config)
    linear = oracles.crl(precise, BATCH, config.model_copy(update={"safe_margin": 10.3, "unsafe_margin": 10.02}))
    for name, weight in (("safe", config.safe), ("unsafe", config.unsafe)):
        assert values[name] > linear[name] - 10 * weight + 1e-3
        assert values[name] > 1e-3


def test_the_mean_unsafe_state_is_differentiated_through(precise) -> None:
    """A gradient that took m for a constant would be another one by far more than the tolerance."""
    config = CONFIGS["crl"]
    _, whole = _joint(precise, config)
    precise.zero_grad(set_to_none=True)
    detached = oracles.crl(precise, BATCH, config, mean_gradient=False)
    torch.stack(list(detached.values())).sum().backward()
    assert relative_l2(flat(gradients(precise)), flat(whole)) > 0.01


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_circuit_breakers_schedule(precise, step) -> None:
    config = CONFIGS["circuit_breaker"]
    terms, expected = _joint(precise, config, step)
    results, got = run_objective(precise, config, step=step)
    assert_matches(sum(r.loss for r in results), torch.stack(list(terms.values())).sum(), tolerance=TOLERANCE)
    assert_matches(flat(got), flat(expected), tolerance=TOLERANCE)


# Constants to the gradient that move with a finite difference: the weights of an ascent, CE-U's own soft-max.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("wga", "sat_imp", "ce_u")])
def test_gradient_equals_finite_differences(precise, name) -> None:
    """Along a random direction of the adapter's parameters, in float64."""
    config = CONFIGS[name]
    _, got = run_objective(precise, config)
    parameters = {n: p for n, p in precise.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    losses = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(direction[n], alpha=sign * 1e-6)
        if sign != 1 or not losses:
            losses.append(sum(float(r.loss) for r in run_objective(precise, config, measure=True)[0]))
    slope = (losses[0] - losses[1]) / 2e-6
    expected = sum(float((got[n] * direction[n]).sum()) for n in parameters)
    assert abs(expected) > 1e-6
    assert slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_levers_change_nothing(name, packing) -> None:
    """With LoRA dropout on: pieces, layout and recomputation give the gradient of one piece."""
    model = precise_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3}))
    plain, expected = run_objective(model, CONFIGS[name], packing=packing, dropout_seed=5)
    for pieces, checkpointed in ((1, 0), (24, 2), (40, BLOCKS)):
        results, got = run_objective(
            model, CONFIGS[name], packing=packing, piece_tokens=pieces, checkpoint_blocks=checkpointed, dropout_seed=5
        )
        assert_matches(flat(got), flat(expected), tolerance=TOLERANCE)
        for result, other in zip(results, plain, strict=True):
            assert_matches(result.loss, other.loss, tolerance=TOLERANCE)
    _, other = run_objective(model, CONFIGS[name], packing=packing, dropout_seed=6)
    assert relative_l2(flat(other), flat(expected)) > 1e-3
