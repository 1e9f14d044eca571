"""At LoRA's start (B = 0) the adapted model is the reference: a run's first batch shows it, bit for bit, before
anything has moved.

What a training step itself measured is read where it must vanish: l2 and mse distances to the reference. Terms whose
value hides a small difference (cosines, triplets, the KL, answers against the reference) are probed with an l2 distance
on the same rows, whose gradient is 0 where the distance is. Fixed directions and pairwise cosines have no reference.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.objectives.streams import Stream
from repbend_fast.step.meter import StreamResult


def is_at_start(model: CausalLM) -> bool:
    """Whether the trained adapter is LoRA's start, so that it changes nothing."""
    moved = [p.detach().any() for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    return not moved or not bool(torch.stack(moved).any())


def probe_of(stream: Stream, num_blocks: int) -> Stream | None:
    """A stream of l2 distances where ``stream``'s own terms compare with the reference in a way that is not 0 at the
    start.
    """
    probes = tuple(probe for term in stream.terms for probe in term.start_probes(num_blocks))
    return replace(stream, terms=probes) if probes else None


def check_zero(stream: Stream, result: StreamResult) -> None:
    """Refuse a first batch whose adapted pass is not its reference pass.

    Raises:
        UserError: names the term, the hidden state and the value.
    """
    for term in stream.terms:
        bound = term.start_bound
        if bound is None:
            continue
        layers = sorted(result.layers.get(term.name, {}).items())
        for layer, value in layers:
            if not abs(float(value)) <= bound:
                raise _not_zero(f"the {term.described} at hidden state {layer}", float(value))
        if not layers and not abs(float(result.terms[term.name])) <= bound:
            raise _not_zero(f"the {term.described}", float(result.terms[term.name]))


def _not_zero(what: str, value: float) -> UserError:
    return UserError(
        f"step 1: before training {what} must be exactly 0, and is {value:.3g}: this model computes otherwise with "
        "gradients than without, "
        "so that every distance would be off; try model.attention=eager"
    )
