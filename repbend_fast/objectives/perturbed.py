"""What a stream's sequences are perturbed by before its terms read them: rows that are added to hidden states of their
prompts, found by projected gradient steps (Sheshadri et al., arXiv 2407.15549). How they are found stands in
``step/searched.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.terms import Distance, Span, Term, Unit

BRIEF = 2
"""Steps after which a search takes no more memory."""


@dataclass(frozen=True)
class Search:
    """A row δ for each prompt row and hidden state, ‖δ‖₂ ≤ ``radius``, that lowers the weighted sum of ``terms``.

    Attributes:
        sequences: what runs while δ is searched, the adapter on and without dropout.
        terms: over ``sequences``; none of them couples two prompts, so that each δ is its own prompt's affair.
        prompts: which prompt each of ``sequences`` begins with. Those of one prompt share its rows.
        shared: which prompt each of the stream's own sequences begins with; None = it is not perturbed.
        spans: the perturbed rows of each prompt, of at least one.
        states: hidden states, below the last; 0 is the embedding's output.
        steps, step_size: of the search, per coordinate; a ``step_size`` of None makes a whole step an eighth of the
            radius long.
        unit: what radius and step size count in.
    """

    sequences: tuple[Sequence, ...]
    terms: tuple[Term, ...]
    prompts: tuple[int, ...]
    shared: tuple[int | None, ...]
    spans: tuple[Span, ...]
    states: tuple[int, ...]
    radius: float
    steps: int
    step_size: float | None = None
    unit: Unit = "state"

    @property
    def unit_power(self) -> int:
        """As of a distance."""
        return 1 if self.unit == "reference" else 0

    @property
    def rows(self) -> int:
        """Perturbed rows in all, at each hidden state."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def measured(self) -> tuple[Distance, ...]:
        """Distances over ``sequences`` whose reference rows have the norms of the units."""
        if not self.unit_power:
            return ()
        spans = tuple(self.spans[prompt] for prompt in self.prompts)
        return (Distance("perturbation", self.states, spans, 1.0, 1.0, unit=self.unit),)

    def wrong(self, own: tuple[Sequence, ...]) -> str | None:
        """What does not fit, in words; ``own`` are the stream's sequences."""
        for what, sequences, prompts in (("search", self.sequences, self.prompts), ("stream", own, self.shared)):
            if len(sequences) != len(prompts):
                return f"its search has {len(prompts)} prompts for {len(sequences)} sequences of the {what}"
            for sequence, prompt in zip(sequences, prompts):
                if prompt is not None and not 0 <= self.spans[prompt][0] < self.spans[prompt][1] <= len(sequence):
                    return f"its search perturbs the rows {self.spans[prompt]} of a sequence of {len(sequence)} tokens"
        lengths = tuple(map(len, self.sequences))
        return next(filter(None, (term.wrong(lengths) for term in self.terms)), None)

    def brief(self) -> Search:
        """The same with as few steps as take its memory."""
        return replace(self, steps=min(self.steps, BRIEF))

    def moved(self, shift: int, top: int) -> tuple[Search, int]:
        """As of a term: the search as the top blocks of a model see it, and rows × hidden states that were cut away."""
        states = tuple(state - shift for state in self.states if state > shift) or (0,)
        terms = tuple(moved for moved, _ in (term.moved(shift, top) for term in self.terms) if moved is not None)
        # δ, its gradient and the optimizer's two moments, in at most twice the width of a state.
        return replace(self, states=states, terms=terms), 8 * self.rows * (len(self.states) - len(states))
