"""The reference pass: trained adapter off, no gradient, and only the rows kept that a term compares."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.switches import reference_model
from repbend_fast.objectives.terms import Term
from repbend_fast.step.terms import Execution, Place, by_layer, visiting


def reference_pass(place: Place, executions: Sequence[Execution[Term]]) -> None:
    """Each term keeps what it compares with; nothing runs where no term does, nor beyond the last hidden state that one
    reads.

    Args:
        place: of any of the executions' pieces, all of which lie in one batch.
    """
    parts, last = place.parts, place.parts.decoder.num_blocks
    keeping = by_layer(executions, lambda term: term.compared_states(last))
    stop = max(1, *keeping) if keeping else 0  # hidden state 0 alone is read before a first block
    if stop == 0 and not any(execution.term.compares_pairs for execution in executions):
        return

    def visit(layer: int, hidden: Tensor) -> Tensor:
        for execution in keeping.get(layer, ()):
            execution.keep(layer, hidden)
        return hidden

    with reference_model(parts.model, parts.switches), parts.autocasting():
        if stop:
            piece, visited = place.piece, visiting(executions, visit)
            run_decoder(parts.decoder, piece.input_ids, packed=piece.packed, stop=stop, visit=visited)
        for execution in executions:
            execution.compare()
