"""At LoRA's start (B = 0) the adapted model is the reference: a run's first batch shows it, bit for bit, before anything has moved.

What a training step itself measured is read where it must vanish: l2 and mse distances to the reference. Terms whose value hides a small
difference (cosines, triplets, the KL, answers against the reference) are probed with an l2 distance on the same rows, whose gradient is 0
where the distance is. Fixed directions and pairwise cosines have no reference.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from repbend_fast.errors import UserError
from repbend_fast.objectives.base import Distance, Stream
from repbend_fast.step.meter import StreamResult

KL_BOUND = 1e-5
"""The KL's sums over the vocabulary round, in nats per token."""


def is_at_start(model: nn.Module) -> bool:
    """Whether the trained adapter is LoRA's start, so that it changes nothing."""
    moved = [p.detach().any() for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    return not moved or not bool(torch.stack(moved).any())


def probe_of(stream: Stream, num_blocks: int) -> Stream | None:
    """A stream of l2 distances where ``stream``'s own terms compare with the reference in a way that is not 0 at the start."""
    found = [
        Distance(term.name, term.layers, term.spans, 1.0, 1.0)
        for term in stream.distances
        if term.target is None and term.against is None and not _vanishes(term)
    ]
    if stream.triplets:
        found += [Distance(half.name, half.layers, half.spans, 1.0, 1.0) for half in stream.triplets.halves if half.layers]
    if stream.head:
        found.append(Distance(stream.head.name, (num_blocks,), stream.head.spans, 1.0, 1.0))
    if stream.answers and stream.answers.beta is not None:
        found.append(Distance(stream.answers.name, (num_blocks,), stream.answers.spans, 1.0, 1.0))
    if not found:
        return None
    return replace(stream, distances=tuple(found), pairwise=None, head=None, triplets=None, answers=None)


def check_zero(stream: Stream, result: StreamResult) -> None:
    """Refuse a first batch whose adapted pass is not its reference pass.

    Raises:
        UserError: names the term, the hidden state and the value.
    """
    for term in stream.distances:
        if term.target is not None or term.against is not None or not _vanishes(term):
            continue
        for layer, value in sorted(result.layers.get(term.name, {}).items()):
            if float(value) != 0:
                raise _not_zero(f"the distance {term.name} at hidden state {layer}", float(value))
    if stream.head:
        kl = float(result.terms[stream.head.name])
        if not abs(kl) <= KL_BOUND:
            raise _not_zero(f"the KL of {stream.head.name}", kl)


def _vanishes(term: Distance) -> bool:
    return term.kind in ("l2", "mse")


def _not_zero(what: str, value: float) -> UserError:
    return UserError(
        f"step 1: before training {what} must be exactly 0, and is {value:.3g}: this model computes otherwise with gradients than without, "
        "so that every distance would be off; try model.attention=eager"
    )
