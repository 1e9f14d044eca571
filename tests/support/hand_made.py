"""Validations made by hand, and what a guard makes of them."""

from __future__ import annotations

from repbend_fast.config.schema import ValidationConfig
from repbend_fast.training.guard import Guard
from repbend_fast.training.validation import Validation


def at(
    step: int,
    *,
    kl: float | None = 0.01,
    perplexity: float | None = 10.0,
    attack: float | None = None,
    helpful: float | None = None,
    borderline: float | None = None,
    degenerate: float = 0.0,
    bend: float = 0.0,
    shares: dict[str, tuple[float, float]] | None = None,
) -> Validation:
    """``shares``: refused and degenerate, by group of attacks."""
    rates = {} if attack is None else {"attack_direct": attack, "attack_prefill": attack}
    for group, (refused, broken) in (shares or {}).items():
        rates |= {f"{group}_refused": refused, f"{group}_degenerate": broken}
    if helpful is not None:
        rates |= {"helpful_ordinary": helpful, "helpful_borderline": helpful if borderline is None else borderline}
        rates["degenerate_ordinary"] = degenerate
    return Validation(step, kl, perplexity, distance={"unsafe": {"2": bend}, "safe": {"2": 0.0}}, rates=rates)


def judged(limits: ValidationConfig, *measured: Validation) -> Guard:
    guard = Guard(limits)
    for validation in measured:
        guard.judge(validation)
    return guard


def best_of(*measured: Validation) -> int:
    best = judged(ValidationConfig(), *measured).best
    assert best is not None
    return best.step
