"""Which learning rate a method gets: every rate trained with the first seed and judged on validation alone, by the
guard's own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repbend_fast.compare.record import SearchRecord
from repbend_fast.errors import UserError
from repbend_fast.report.run_record import RunRecord
from repbend_fast.training.guard import rank
from repbend_fast.training.validation import Validation


@dataclass(frozen=True)
class Try:
    """One rate of the search. ``best`` is the kept validation of its run; None = ``broke_off``, the reason why training
    could not go on.
    """

    learning_rate: float
    best: Validation | None
    broke_off: str | None = None

    @property
    def bent(self) -> bool:
        """Whether an adapter of a later step than 0 stayed within limits."""
        return self.best is not None and self.best.step > 0


def try_of(learning_rate: float, record: RunRecord) -> Try:
    """What the search reads of a run: its validations, nothing else."""
    reason = next((str(row["reason"]) for row in record.events if row.get("event") == "not_finite"), None)
    kept = [row for row in record.validations if row.get("best")]
    if reason is not None or not kept:
        return Try(learning_rate, None, reason or "no validation")
    return Try(learning_rate, Validation.from_row(kept[-1]))


def order(tried: Try) -> tuple[bool, bool, tuple[float, ...], float]:
    """Lower is better: rates that bent something within limits first, by the guard's rank of their best validation,
    then the lower rate.
    """
    ranked = rank(tried.best) if tried.best is not None else ()
    return tried.best is None, not tried.bent, ranked, tried.learning_rate


def choose(name: str, tries: Sequence[Try]) -> tuple[Try, str]:
    """The chosen rate and why it was chosen.

    Raises:
        UserError: the loss was not finite with every rate.
    """
    chosen, *rest = sorted(tries, key=order)
    if chosen.best is None:
        raise UserError(
            f"{name}: no learning rate could be trained to the end ({chosen.broke_off}); add a lower one with --rates"
        )
    return chosen, _why(chosen, rest)


def _why(chosen: Try, rest: Sequence[Try]) -> str:
    best = chosen.best
    assert best is not None
    if not chosen.bent:
        kept = "within validation's limits, so the model is kept as it was"
        if not rest:
            return f"the only rate; it never left step 0 {kept}"
        return f"no rate left step 0 {kept}; the lowest of the rates stands for it"
    what = (
        f"attack success {best.attack:.1%}"
        if best.attack is not None
        else f"unsafe minus safe distance {best.bending:.4g}"
    )
    found = f"{what} at step {best.step}, within limits"
    rivals = [other.best for other in rest if other.bent and other.best is not None]
    if not rest:
        return f"the only rate; {found}"
    if not rivals:
        return f"{found}, where no other rate left step 0"
    first = "the lowest" if best.attack is not None else "the largest"
    alike = [rival for rival in rivals if rival.settled == best.settled]
    if not alike:
        return f"{found}: the only one at the target with a learning rate that has fallen to 0"
    equal = [rival for rival in alike if rank(rival).attack == rank(best).attack]
    if not equal:
        return (
            f"{found}: {first} of the rates"
            if len(alike) == len(rivals)
            else f"{found}: {first} of those that end at the target"
        )
    if all(rank(rival).refusal > rank(best).refusal for rival in equal):
        return f"{found}: {first}, shared with another rate; more attacks refused, fewer degenerate answers to them"
    equal = [rival for rival in equal if rank(rival).refusal == rank(best).refusal]
    if all(rank(rival).usefulness > rank(best).usefulness for rival in equal):
        return f"{found}: {first}, shared with another rate; more helpful, fewer degenerate ones"
    if all(rank(rival) > rank(best) for rival in equal):
        return f"{found}: {first}, shared with another rate; KL {_kl(best)} is the lower one"
    return f"{found}: {first}, KL {_kl(best)} shared with another rate too; the lower rate"


def _kl(validation: Validation) -> str:
    return "not measured" if validation.kl is None else f"{validation.kl:.4f}"


def search_record(chosen: Try, why: str, runs: Sequence[tuple[Try, RunRecord, str]]) -> SearchRecord:
    """The search of one method as plain values; ``runs``: each try with its run and the run's folder as it is to be
    shown.
    """
    return {
        "chosen": chosen.learning_rate,
        "why": why,
        "runs": [_run(tried, record, folder) for tried, record, folder in runs],
    }


def _run(tried: Try, record: RunRecord, folder: str) -> dict[str, object]:
    return {
        "learning_rate": tried.learning_rate,
        "folder": folder,
        "best_step": None if tried.best is None else tried.best.step,
        "broke_off": tried.broke_off,
        "stopped": None if record.stop is None else record.stop["reason"],
        "steps": len(record.steps),
        "validations": [_validation(row) for row in record.validations],
    }


def _validation(row: dict[str, object]) -> dict[str, object]:
    """A validation without its distances of each hidden state, and with what is ranked."""
    validation = Validation.from_row(row)
    shown = {key: value for key, value in row.items() if key not in ("type", "distance")}
    return shown | {"attack": validation.attack, "refusal": validation.refusal, "bending": validation.bending}
