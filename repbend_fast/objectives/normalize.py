"""Denominators over a whole optimizer step, for ``training.normalize: step``.

A step of M micro-batches has the gradient of their mean, (1/M) Σ_m w·s_m/d_m, where s_m and d_m are a term's sum and denominator in
micro-batch m. With D = Σ_m d_m, every d_m replaced by D/M makes that w·Σ_m s_m / D, the term of all rows of the step at once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from typing import Any

from repbend_fast.objectives.base import AnswerLoss, Span, Stream, Triplets

Key = tuple[Any, ...]


def over_step(micro_batches: Seq[list[Stream]]) -> list[list[Stream]]:
    """The streams of one optimizer step with each term's denominator taken over all of its micro-batches.

    A term is the same in two micro-batches where its own name and its stream's are. One without rows in a micro-batch adds nothing
    there. A mean that couples the sequences of a micro-batch (the pairwise cosine, the mean state of the triplets) stays within it.
    """
    denominators: defaultdict[Key, float] = defaultdict(float)
    rows: defaultdict[Key, int] = defaultdict(int)

    def count(key: Key, term: Any) -> Any:
        denominators[key] += term.denominator if _counts(term) else 0
        rows[key] += _rows(term.spans)
        return term

    def divide(key: Key, term: Any) -> Any:
        total = denominators[key]
        changed = {"denominator": total / len(micro_batches)} if total else {}
        if hasattr(term, "rows") and rows[key]:
            changed["rows"] = rows[key] / len(micro_batches)
        return replace(term, **changed)

    for streams in micro_batches:
        _each_term(streams, count)
    return [_each_term(streams, divide) for streams in micro_batches]


def _rows(spans: tuple[Span, ...]) -> int:
    return sum(stop - start for start, stop in spans)


def _counts(term: Any) -> bool:
    """Whether the denominator is the term's own: one without rows has 1, to divide by. Preference has a value without rows too."""
    preference = isinstance(term, AnswerLoss) and term.beta is not None
    return bool(term.spans) if preference else _rows(term.spans) > 0


def _each_term(streams: list[Stream], work: Callable[[Key, Any], Any]) -> list[Stream]:
    """The streams with ``work`` done on every term that has a denominator. Terms of one name are told apart by their order."""
    names: Counter[Key] = Counter()
    found = []
    for stream in streams:
        names[stream.name,] += 1
        place = (stream.name, names[stream.name,])

        def each(value: Any, place: Key = place) -> Any:
            if isinstance(value, tuple):
                return tuple(each(item, place) for item in value)
            if isinstance(value, Triplets):
                return Triplets(each(value.safe, place), each(value.unsafe, place))
            if not hasattr(value, "denominator"):
                return value
            names[*place, value.name] += 1
            return work((*place, value.name, names[*place, value.name]), value)

        parts = {f.name: getattr(stream, f.name) for f in fields(stream) if f.init and f.name not in ("name", "sequences")}
        found.append(replace(stream, **{name: each(value) for name, value in parts.items()}))
    return found
