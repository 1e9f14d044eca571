"""Denominators over a whole optimizer step, for ``training.normalize: step``.

A step of M micro-batches has the gradient of their mean, (1/M) Σ_m w·s_m/d_m, where s_m and d_m are a term's sum and
denominator in micro-batch m. With D = Σ_m d_m, every d_m replaced by D/M makes that w·Σ_m s_m / D, the term of all rows
of the step at once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, Protocol, cast

from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Span, rows_in

Key = tuple[str | int, ...]


class Part(Protocol):
    """What is divided by a denominator of its own: a term, or one of its halves; always a dataclass."""

    @property
    def name(self) -> str: ...
    @property
    def spans(self) -> tuple[Span, ...]: ...
    @property
    def denominator(self) -> float: ...
    @property
    def divides(self) -> bool: ...


def over_step(micro_batches: Seq[list[Stream]]) -> list[list[Stream]]:
    """The streams of one optimizer step with each term's denominator taken over all of its micro-batches.

    A term is the same in two micro-batches where its own name and its stream's are. One without rows in a micro-batch
    adds nothing there. A mean that couples the sequences of a micro-batch (the pairwise cosine, the mean state of the
    triplets) stays within it.
    """
    denominators: defaultdict[Key, float] = defaultdict(float)
    rows: defaultdict[Key, int] = defaultdict(int)

    def count(key: Key, part: Part) -> Part:
        denominators[key] += part.denominator if part.divides else 0
        rows[key] += rows_in(part.spans)
        return part

    def divide(key: Key, part: Part) -> Part:
        total = denominators[key]
        changed = {"denominator": total / len(micro_batches)} if total else {}
        if hasattr(part, "rows") and rows[key]:
            changed["rows"] = rows[key] / len(micro_batches)
        return cast(Part, replace(cast(Any, part), **changed))

    for streams in micro_batches:
        _each_part(streams, count)
    return [_each_part(streams, divide) for streams in micro_batches]


def _each_part(streams: list[Stream], work: Callable[[Key, Part], Part]) -> list[Stream]:
    """The streams with ``work`` done on every part of a term that has a denominator. Streams of one name are told apart
    by their order.
    """
    names: Counter[str] = Counter()
    found = []
    for stream in streams:
        names[stream.name] += 1
        place = (stream.name, names[stream.name])
        terms = (
            term.with_parts(tuple(work((*place, part.name), part) for part in term.parts)) for term in stream.terms
        )
        found.append(replace(stream, terms=tuple(terms)))
    return found
