"""The adapted pass: taps between the blocks, and the loss of the pieces that share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.offload import host_states
from repbend_fast.objectives.terms import Term
from repbend_fast.step.terms import Execution, Place, by_layer, visiting


def adapted_pass(place: Place, executions: Sequence[Execution[Term]]) -> Tensor:
    """The share of the executions' pieces in their streams' weighted losses, differentiable in the adapter.

    What the reference pass kept is used up: its buffers become gradient directions.

    Args:
        place: of any of the pieces, all of which lie in one batch.
    """
    parts, last = place.parts, place.parts.decoder.num_blocks
    tapping = by_layer(executions, lambda term: term.read_states(last))

    def visit(layer: int, hidden: Tensor) -> Tensor:
        for execution in tapping.get(layer, ()):
            hidden = execution.tap(layer, hidden)
        return hidden

    with parts.autocasting():
        run_decoder(
            parts.decoder,
            place.piece.input_ids,
            packed=place.piece.packed,
            stop=max(tapping),
            visit=visiting(executions, visit),
            checkpoint_blocks=place.levers.checkpoint_blocks,
            offload=host_states(place.levers.offload_checkpoints, parts.device),
        )
    losses = [loss for execution in executions for loss in execution.losses()]
    for execution in executions:
        execution.release()
    return torch.stack(losses).sum()
