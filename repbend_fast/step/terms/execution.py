"""How a kind of term is computed: an :class:`Execution` for each term and piece, found by the term's class.

    first_pass(term, first, piece)    sums over the whole stream, once it is split; none for most kinds
    keep(l, hidden)                   in the reference pass, at each hidden state that the term compares
    compare()                         at the end of the reference pass, the adapter still off
    tap(l, hidden)                    in the adapted pass, at each hidden state that the term reads; the result takes
                                      its place
    losses()                          the piece's weighted share of the term, differentiable
    report(term, meter, result, sums) what the stream's run says of it

An execution is freed with its piece, so that nothing of a piece that ran out of memory stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.layers.truncated import Visit
from repbend_fast.models.perturbation import Perturbation
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Term
from repbend_fast.step.levers import Levers
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece

T = TypeVar("T")
Kind = TypeVar("Kind", bound=Term, covariant=True)


@dataclass(frozen=True)
class Place:
    """Where a term is computed: a piece of a stream on a model under the levers in force. ``meter`` receives the
    piece's values; ``perturbation`` is added to its hidden states in either pass.
    """

    parts: ModelParts
    stream: Stream
    piece: Piece
    levers: Levers
    meter: Meter
    perturbation: Perturbation | None = None

    def visit(self, then: Visit) -> Visit:
        """What a pass over the piece visits its hidden states with."""
        return then if self.perturbation is None else self.perturbation.visit(then)


class FirstPass(Protocol):
    """What a term may run over the whole stream before its first piece is differentiated."""

    parts: ModelParts
    stream: Stream

    def each(
        self, sequences: tuple[Sequence, ...], work: Callable[[Piece], T], members: Iterable[int] | None = None
    ) -> Iterator[T]:
        """``work`` on each piece of the sequences, or of those ``members``; one that runs out of memory is done again
        in smaller ones.
        """
        ...

    def sums(self, piece: Piece) -> AbstractContextManager[object]:
        """Inside of it the adapter is on and the stream's dropout in force, without a gradient."""
        ...

    def visit(self, piece: Piece, then: Visit) -> Visit:
        """As of a place."""
        ...

    def totals(self, tensors: Seq[Tensor]) -> list[Tensor]:
        """The sums of ``tensors`` over all processes of the run, where each runs a share of the stream; alone, what was
        given.
        """
        ...

    def reference(self, term: Term, piece: Piece) -> Execution[Term]:
        """The term's execution behind a reference pass of its own over ``piece``."""
        ...


class Execution(Generic[Kind]):
    """One term in one piece.

    Attributes:
        sums: of ``first_pass``, over the whole stream; None where the piece is all of it.
        kept: rows of the reference by hidden state, [R, D].
        sums_lack_piece: whether the sums are without the piece that they were taken for, whose own states are added to
            them; they stay only when that piece is done.
    """

    sums_lack_piece = False

    def __init__(self, term: Kind, place: Place, sums: Any = None) -> None:
        self.term, self.place, self.sums = term, place, sums
        self.kept: dict[int, Tensor] = {}
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Flat rows of the term in the piece, int64 [R]."""
        if self._rows is None:
            self._rows = self.place.piece.rows(self.term.spans)
        return self._rows

    @classmethod
    def first_pass(cls, term: Any, first: FirstPass, piece: Piece | None) -> object:
        """Sums over the stream, which is split, before ``piece`` of it runs; None where the kind needs none.

        Without a ``piece`` the stream is shared between processes: the sums are over all of it, and go
        through ``first.totals``.
        """
        return None

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Keep the reference's rows of a hidden state."""
        self.kept[layer] = hidden.reshape(-1, hidden.shape[-1])[self.rows]

    def compare(self) -> None:
        """What else needs the adapter off."""

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        """Read a hidden state of the adapted pass."""
        return hidden

    def losses(self) -> list[Tensor]:
        """The weighted losses of the piece; called once, behind the adapted pass."""
        return []

    def release(self) -> None:
        """Let go of what backward has no use for."""
        self._rows = None

    @classmethod
    def report(cls, term: Any, meter: Meter, result: StreamResult, sums: Any) -> None:
        """Enter the term's values of the whole stream into ``result``."""
        for name in term.names:
            if name in meter.values:
                result.terms[name] = meter.values[name]


EXECUTIONS: dict[type[Term], type[Execution[Term]]] = {}
"""By the class of the declaration."""

E = TypeVar("E", bound=type[Execution[Term]])


def executes(kind: type[Term]) -> Callable[[E], E]:
    """Class decorator: terms of this ``kind`` and of classes derived from it are computed so."""

    def enter(execution: E) -> E:
        EXECUTIONS[kind] = execution
        return execution

    return enter


def execution_of(term: Term) -> type[Execution[Term]]:
    """How ``term`` is computed.

    Raises:
        TypeError: nothing executes its kind.
    """
    for kind in type(term).__mro__:
        if kind in EXECUTIONS:
            return EXECUTIONS[kind]
    name = type(term).__name__
    raise TypeError(
        f"{term.described}: nothing says how a {name} is computed; decorate an Execution with "
        f"step.terms.executes({name})"
    )


def visiting(executions: Seq[Execution[Term]], then: Visit) -> Visit:
    """What a pass over the executions' pieces visits its hidden states with: ``then`` behind each piece's
    perturbation.
    """
    for place in {id(execution.place): execution.place for execution in executions}.values():
        then = place.visit(then)
    return then


def by_layer(
    executions: Seq[Execution[Term]], layers_of: Callable[[Term], Iterable[int]]
) -> dict[int, list[Execution[Term]]]:
    """The executions that have something to do at a hidden state, by hidden state, in their order."""
    found: dict[int, list[Execution[Term]]] = {}
    for execution in executions:
        for layer in layers_of(execution.term):
            found.setdefault(layer, []).append(execution)
    return found
