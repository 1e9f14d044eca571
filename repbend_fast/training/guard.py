"""The over-bending guard: which validation's adapter is the best by a stated rule, and when to stop.

The unsafe distance has no bound, so the loss keeps falling while ordinary answers fall apart. A validation is *within
limits* when KL, perplexity and usefulness are; among those the *best* has the lowest attack rate (with prompts) or the
largest unsafe-minus-safe distance (without). Of equals it is the one that refuses more attacks in place of answering
them with gibberish, then the one with more useful answers, then with the lower KL. Before them comes one that is
*settled*: at the target, with the learning rate at 0. Training stops when a limit is passed, or when it has settled at
the target.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from repbend_fast.config.schema import ValidationConfig
from repbend_fast.training.validation import HELPFUL_LIMITS, Validation

RATE_DIGITS = 9


class Rank(NamedTuple):
    """The levels on which validations are compared, the first one first; lower is better on each."""

    unsettled: bool
    attack: float
    refusal: float
    usefulness: float
    kl: float


@dataclass
class Guard:
    """Judges validations against the one before training, remembers the best, says when to stop. JSON-able for
    resuming.
    """

    limits: ValidationConfig
    before: Validation | None = None
    best: Validation | None = None
    consecutive: int = 0
    at_target: int = 0
    reached: int | None = None

    @property
    def anneal(self) -> range | None:
        """The steps from reaching the target to the run's end, over which the learning rate falls to 0; None before."""
        return None if self.reached is None else range(self.reached, self.reached + self.limits.target_anneal_steps)

    def is_annealed(self, step: int) -> bool:
        """Whether the run, its target reached, has come to its end at ``step``."""
        return self.anneal is not None and step >= self.anneal.stop

    @property
    def target_line(self) -> str:
        """What is said of a target that is reached."""
        return f"validation.target_attack={self.limits.target_attack:g} reached"

    def judge(self, validation: Validation, rate_is_zero: bool = False) -> None:
        """Fill in ``over``, ``settled`` and ``best`` of a validation. The first one, before training, is the yardstick
        and the first best.

        Args:
            rate_is_zero: the learning rate has fallen to 0, so the adapter moves no more.
        """
        if self.before is None:
            self.before = self.best = validation
            validation.perplexity_ratio = 1.0 if validation.perplexity is not None else None
            validation.best = True
            return
        if validation.perplexity is not None and self.before.perplexity:
            validation.perplexity_ratio = validation.perplexity / self.before.perplexity
        validation.over = list(self._passed_limits(validation))
        self.consecutive = self.consecutive + 1 if validation.over else 0
        at_target = self._is_at_target(validation)
        self.at_target = self.at_target + 1 if at_target else 0
        if self.reached is None and self.at_target >= self.limits.target_patience:
            self.reached = validation.step
        validation.settled = at_target and rate_is_zero
        if not validation.over and (self.best is None or rank(validation) < rank(self.best)):
            validation.best = True
            self.best = validation

    def stop_reason(self, validation: Validation) -> str | None:
        """Why training must stop now, or None."""
        if self.consecutive >= self.limits.patience:
            return "; ".join(validation.over)
        if self.is_annealed(validation.step):
            return self.target_line + (f" at step {self.reached}, learning rate annealed since" if self.anneal else "")
        return None

    def _is_at_target(self, validation: Validation) -> bool:
        target = self.limits.target_attack
        return (
            target is not None
            and not validation.over
            and bool(validation.attacks)
            and max(validation.attacks) <= target
        )

    def reopen(self) -> None:
        """Count anew towards stopping, for a run that goes on under other limits."""
        self.consecutive = self.at_target = 0
        self.reached = None

    def limits_in_force(self) -> dict[str, float | None]:
        """The settings that decide when training stops; other ones on resuming reopen a run that was stopped."""
        targets = ("target_attack", "target_patience", "target_anneal_steps", "patience")
        return self.limits.model_dump(include={"max_kl", "max_perplexity_ratio", *HELPFUL_LIMITS, *targets})

    def _passed_limits(self, now: Validation) -> list[str]:
        limits, before, over = self.limits, self.before, []
        assert before is not None
        if limits.max_kl is not None and now.kl is not None and not now.kl <= limits.max_kl:
            over.append(f"kl {now.kl:.4f} > validation.max_kl {limits.max_kl:g}")
        ratio = now.perplexity_ratio
        if limits.max_perplexity_ratio is not None and ratio is not None and not ratio <= limits.max_perplexity_ratio:
            over.append(
                f"perplexity ratio {ratio:.3f} > validation.max_perplexity_ratio {limits.max_perplexity_ratio:g}"
            )
        for key, rate in HELPFUL_LIMITS.items():
            allowed = getattr(limits, key)
            if allowed is None or rate not in now.rates or rate not in before.rates:
                continue
            drop = before.rates[rate] - now.rates[rate]
            if drop > allowed + 1e-9:
                over.append(f"{rate} fell by {drop:.3f} > validation.{key} {allowed:g}")
        return over

    def state_dict(self) -> dict[str, object]:
        return {
            "before": asdict(self.before) if self.before else None,
            "best": asdict(self.best) if self.best else None,
            "consecutive": self.consecutive,
            "at_target": self.at_target,
            "reached": self.reached,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = Validation(**state["before"]) if state["before"] else None
        self.best = Validation(**state["best"]) if state["best"] else None
        self.consecutive, self.at_target, self.reached = state["consecutive"], state["at_target"], state.get("reached")


def rank(validation: Validation) -> Rank:
    """Of two validations within limits the one that ranks lower is better: a settled one, then by attack rate (without
    prompts, minus bending), then minus refusal, then minus usefulness, then KL.

    An attack that fails because the model babbles is as little a success as one that it refuses, so attack rates cannot
    tell the two apart; of equal ones the adapter that refuses is the one to use. Settled comes first because a few
    dozen prompts cannot tell an adapter that has come to rest from one that a batch has just pushed to the target: the
    latter's attacks and loops show on other prompts (docs/log.md).
    """
    first = validation.attack if validation.attack is not None else -validation.bending
    kl = validation.kl if validation.kl is not None else 0.0
    # Rates are counts over a few prompts; the rounding of their sums must not decide between equals.
    attack, refusal, usefulness = (
        round(value, RATE_DIGITS) for value in (first, -validation.refusal, -validation.usefulness)
    )
    return Rank(not validation.settled, attack, refusal, usefulness, kl)
