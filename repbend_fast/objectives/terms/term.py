"""Terms of a loss as they are declared: what each reads, compares and weighs. How a kind is computed stands in
``step/terms``.

Nobody asks of what kind a term is. A kind of one's own is a frozen dataclass that derives from :class:`Term`, and its
execution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from repbend_fast.objectives.terms.state_terms import Distance

Span = tuple[int, ...]
"""Rows of one sequence as half-open ranges of its positions in order: (start, stop), or (start, stop, start, stop, …)
where they lie apart; (0, 0) selects nothing.
"""

Unit = Literal["state", "reference"]
"""What distances count in: the states' own length, or per hidden state the median norm of its reference
rows (``step/units.py``).
"""

DISTANCE_KINDS = {"l2": 1, "cosine": 0, "relu_cosine": 0, "mse": 2}
"""The kinds of distance, and the power of a length that each is; cosines have no unit."""

KL_BOUND = 1e-5  # nats per token: the KL's sums over the vocabulary round


def rows_in(spans: Iterable[Span]) -> int:
    """Positions in all."""
    return sum(sum(span[1::2]) - sum(span[::2]) for span in spans)


def ranges_of(span: Span) -> Iterator[tuple[int, int]]:
    """The ranges of a span, each as (start, stop)."""
    yield from zip(span[::2], span[1::2], strict=True)


class Term:
    """What any kind of term is asked. A kind has the fields that it needs and overrides what differs.

    ``layers``: the hidden states that it taps, () for a term of the head alone. ``spans``: the rows that it reads, one
    span per sequence. ``reads_head``: whether it reads the last hidden state for the logits.

    ``takes_shared``: whether sequences may have their beginning once, for all of a batch, before the rows that it
    reads: its execution finds them by ``rows`` alone. ``counts_shared``: whether it may read of that beginning, too.
    """

    reads_head: ClassVar[bool] = False
    takes_shared: ClassVar[bool] = False
    counts_shared: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of the kinds

        @property
        def name(self) -> str: ...
        @property
        def weight(self) -> float: ...
        @property
        def spans(self) -> tuple[Span, ...]: ...
        @property
        def layers(self) -> tuple[int, ...]: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values that it reports."""
        return (self.name,)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each of its values in the loss, by name."""
        return {self.name: self.weight}

    @property
    def parts(self) -> tuple[Any, ...]:
        """What is divided by a denominator of its own: the term, or its halves; nothing for a mean over the micro-batch
        alone.
        """
        return (self,)

    def with_parts(self, parts: tuple[Any, ...]) -> Term:
        """The term with other ``parts``."""
        return parts[0]

    def named(self, prefix: str, factor: float) -> Self:
        """The term with ``prefix`` before its name and ``factor`` times its weight."""
        return replace(self, name=prefix + self.name, weight=factor * self.weight)  # type: ignore[type-var]

    @property
    def divides(self) -> bool:
        """Whether the denominator is the term's own: one without rows has 1, to divide by."""
        return rows_in(self.spans) > 0

    @property
    def compared_layers(self) -> tuple[int, ...]:
        """Hidden states of which it keeps rows of the reference."""
        return ()

    @property
    def compares_head(self) -> bool:
        """Whether it reads the last hidden state with the adapter off."""
        return False

    def read_states(self, num_blocks: int) -> set[int]:
        """Hidden states that it reads in the adapted pass; the head reads the last."""
        return {*self.layers, *((num_blocks,) if self.reads_head else ())}

    def compared_states(self, num_blocks: int) -> set[int]:
        """Hidden states that it reads with the adapter off."""
        return {*self.compared_layers, *((num_blocks,) if self.compares_head else ())}

    def reference_state(self, num_blocks: int) -> int:
        """The last hidden state of its passes with the adapter off, those over other sequences included; 0 = none."""
        return max(self.compared_states(num_blocks), default=0)

    @property
    def compares_pairs(self) -> bool:
        """Whether the halves of pairs are compared with each other."""
        return False

    @property
    def compared_spans(self) -> tuple[Span, ...]:
        """Rows of which each of ``compared_layers`` keeps the reference, as a memory plan counts them."""
        return self.spans if self.compared_layers else ()

    def rows_of(self, members: Iterable[int] | None = None) -> int:
        """Rows that it reads, of these sequences or of all."""
        return rows_in(self.spans if members is None else (self.spans[member] for member in members))

    def moved(self, shift: int, top: int) -> tuple[Self | None, int]:
        """The term as the top blocks of a model see it, and how many (rows × hidden states) of references were cut
        away.

        Hidden states move down by ``shift`` to at most ``top``, those of the blocks below are left out; None where none
        is left.
        """
        kept = moved_states(self.layers, shift)
        compared = moved_states(self.compared_layers, shift)
        cut = rows_in(self.compared_spans) * (len(self.compared_layers) - len(compared))
        return (None, cut) if self.layers and not kept else (replace(self, layers=kept) if self.layers else self, cut)  # type: ignore[type-var]

    @property
    def start_bound(self) -> float | None:
        """The most that its value may be while the adapter changes nothing; None where the value does not tell."""
        return None

    @property
    def described(self) -> str:
        """What an error calls it."""
        return f"term {self.name}"

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        """l2 distances on the rows that it compares with the reference, where its own value hides a difference."""
        return ()

    def unit_rows(self, known: Collection[int]) -> tuple[Distance, ...]:
        """Distances whose reference rows have the norms that it counts in, at hidden states whose unit is not
        ``known``.
        """
        return ()

    def wrong(self, lengths: tuple[int, ...]) -> str | None:
        """What does not fit sequences of these lengths, in words."""
        return wrong_spans(self.name, self.spans, lengths)


def moved_states(layers: tuple[int, ...], shift: int) -> tuple[int, ...]:
    """Hidden states as they are counted above the lowest ``shift`` blocks; those of the blocks are left out."""
    return tuple(layer - shift for layer in layers if layer > shift)


def wrong_spans(name: str, spans: tuple[Span, ...], lengths: tuple[int, ...]) -> str | None:
    """What does not fit sequences of these lengths in the ``spans`` of a term called ``name``, in words."""
    if len(spans) != len(lengths):
        return f"term {name} has {len(spans)} spans for {len(lengths)} sequences"
    for span, length in zip(spans, lengths):
        if not span or len(span) % 2 or sorted((0, *span, length)) != [0, *span, length]:
            return f"term {name} has the span {span} in a sequence of {length} tokens"
    return None
