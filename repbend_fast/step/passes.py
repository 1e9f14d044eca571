"""The two passes of one piece: the reference, and the adapted one with taps between the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from repbend_fast.models.adapters import reference_model
from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.offload import host_states
from repbend_fast.objectives.terms import Term
from repbend_fast.step.terms import Execution, Place

Executions = Sequence[Execution[Any]]


def _by_layer(executions: Executions, layers_of: Callable[[Term], Iterable[int]]) -> dict[int, list[Execution[Any]]]:
    found: dict[int, list[Execution[Any]]] = {}
    for execution in executions:
        for layer in layers_of(execution.term):
            found.setdefault(layer, []).append(execution)
    return found


def reference_pass(place: Place, executions: Executions) -> None:
    """Trained adapter off, no gradient: each term keeps what it compares with, and nothing runs beyond the last of it.

    Nothing runs at all where no term compares.
    """
    parts, last = place.parts, place.parts.decoder.num_blocks
    keeping = _by_layer(executions, lambda term: {*term.compared_layers, *((last,) if term.compares_head else ())})
    stop = max(keeping, default=0)
    if stop == 0:
        return

    def visit(layer: int, hidden: Tensor) -> Tensor:
        for execution in keeping.get(layer, ()):
            execution.keep(layer, hidden)
        return hidden

    with reference_model(parts.model), parts.autocasting():
        run_decoder(parts.decoder, place.piece.input_ids, position_ids=place.piece.position_ids, stop=stop, visit=visit)
        for execution in executions:
            execution.compare()


def adapted_pass(place: Place, executions: Executions) -> Tensor:
    """The piece's share of the stream's weighted loss, differentiable in the adapter.

    What the reference pass kept is used up: its buffers become gradient directions.
    """
    parts, last = place.parts, place.parts.decoder.num_blocks
    tapping = _by_layer(executions, lambda term: {*term.layers, *((last,) if term.reads_head else ())})

    def visit(layer: int, hidden: Tensor) -> Tensor:
        for execution in tapping.get(layer, ()):
            hidden = execution.tap(layer, hidden)
        return hidden

    with parts.autocasting():
        run_decoder(
            parts.decoder,
            place.piece.input_ids,
            position_ids=place.piece.position_ids,
            stop=place.stream.stop(last),
            visit=visit,
            checkpoint_blocks=place.levers.checkpoint_blocks,
            offload=host_states(place.levers.offload_checkpoints, parts.device),
        )
    losses = [loss for execution in executions for loss in execution.losses()]
    return torch.stack(losses).sum()
