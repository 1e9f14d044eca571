"""A stream: a set of sequences and a tuple of terms. The loss is a sum over streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from repbend_fast.data.records import Sequence
from repbend_fast.errors import UserError
from repbend_fast.objectives.perturbed import Search
from repbend_fast.objectives.terms import Term


class StreamError(UserError):
    """A stream or a term that cannot be what it says."""


@dataclass(frozen=True)
class Stream:
    """One batch with one role and the loss terms read from it, in the order in which they tap a hidden state. With a
    ``search`` its prompts are perturbed before.

    Raises:
        StreamError: two terms of one name, or one that does not fit the sequences.
    """

    name: str
    sequences: tuple[Sequence, ...]
    terms: tuple[Term, ...] = ()
    search: Search | None = None
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        lengths = tuple(len(sequence) for sequence in self.sequences)
        twice = [
            name for name, times in Counter(name for term in self.terms for name in term.names).items() if times > 1
        ]
        wrong = (
            f"two of its terms are named {twice[0]}"
            if twice
            else next(filter(None, (t.wrong(lengths) for t in self.terms)), None)
        )
        wrong = wrong or (self.search.wrong(self.sequences) if self.search else None)
        if wrong:
            raise StreamError(f"stream {self.name}: {wrong}")
        object.__setattr__(self, "layers", tuple(sorted({layer for term in self.terms for layer in term.layers})))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each value in the total loss, by name."""
        return {name: weight for term in self.terms for name, weight in term.weights.items() if weight}

    @property
    def reads_head(self) -> bool:
        """Whether a term reads logits."""
        return any(term.reads_head for term in self.terms)

    @property
    def needs_head(self) -> bool:
        """Whether one of its passes reads logits, those of its search included."""
        return self.reads_head or self.search is not None

    def head_rows(self, members: Iterable[int] | None = None) -> int:
        """Rows that the head reads, of these sequences or of all; 0 where it reads none."""
        chosen = None if members is None else tuple(members)
        own = max((term.rows_of(chosen) for term in self.terms if term.reads_head), default=0)
        searched = self.search.terms if self.search and chosen is None else ()
        return max([own, *(term.rows_of() for term in searched)])

    def term(self, name: str) -> Any:
        """The term of that name, None where there is none."""
        return next((term for term in self.terms if name in term.names), None)

    def weighed(self, name: str, weight: float) -> Stream:
        """The stream with another weight of the term ``name``, if it has one."""
        found = self.term(name)
        if found is None:
            return self
        return replace(
            self, terms=tuple(replace(term, weight=weight) if term is found else term for term in self.terms)
        )

    def stop(self, num_blocks: int) -> int:
        """Last hidden state that the passes of this stream must reach."""
        return num_blocks if self.reads_head else max(self.layers)

    @property
    def attacked(self) -> Stream:
        """What its search runs, as a stream of its own that is perturbed by what it finds."""
        assert self.search is not None
        search = replace(self.search, shared=self.search.prompts)
        return Stream(self.name, search.sequences, search.terms, search)

    def reach(self, num_blocks: int) -> int:
        """Last hidden state that any of its passes reaches, those of its search included."""
        return num_blocks if self.needs_head else self.stop(num_blocks)

    def reference_stop(self, num_blocks: int) -> int:
        """Last hidden state that a term compares with the adapter off; 0 where none does, and no reference
        pass runs.
        """
        return max((term.reference_state(num_blocks) for term in self.terms), default=0)
