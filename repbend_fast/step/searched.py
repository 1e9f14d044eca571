"""The search of a stream's perturbation (``objectives/perturbed.py``), and where its rows go in a piece.

A search runs over the whole stream before anything else of it, the sequences of one prompt together, so that a first
pass, the reference and the adapted pass of every piece read the same rows. It draws nothing, and dropout is off: a
stream that is cut, or a run that is resumed, finds the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from repbend_fast.models.layers.lora import lora_dropout
from repbend_fast.models.layers.packing import to_device
from repbend_fast.models.perturbation import Perturbation, find_perturbation
from repbend_fast.objectives.perturbed import Search
from repbend_fast.step.adapted import adapted_pass
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece, make_piece, split
from repbend_fast.step.terms import Place, execution_of

Deltas = dict[int, Tensor]
"""Rows [M, D] by hidden state."""
FIRST_STEPS = 8
"""Steps of the default size that lead from 0 to the radius."""


@dataclass(frozen=True)
class Found:
    """Rows of each prompt of a stream, in the dtype of its hidden states."""

    search: Search
    deltas: Mapping[int, Deltas]

    def at(self, piece: Piece) -> Perturbation | None:
        """The perturbation of a piece of the stream; None where none of its sequences is perturbed."""
        numbers, rows, of = perturbed_rows(piece, self.search, self.search.shared)
        if not numbers:
            return None
        deltas = {state: torch.cat([self.deltas[n][state] for n in numbers]) for state in self.search.states}
        return Perturbation.fixed(deltas, rows, of)


def perturbed_rows(
    piece: Piece, search: Search, prompts: tuple[int | None, ...], starts: Mapping[int, int] | None = None
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """The prompts in a piece, its perturbed flat rows (int64 [N]), and which of the prompts' rows, in their order, is
    added at each (int64 [N]).

    Args:
        prompts: the prompt of each of the stream's sequences.
        starts: where the rows of each prompt begin; None = in the order of the prompts in this piece.
    """
    device = piece.input_ids.device
    numbers = tuple(dict.fromkeys(n for n in (prompts[m] for m in piece.members) if n is not None))
    if starts is None:
        lengths = (search.spans[n][1] - search.spans[n][0] for n in numbers)
        starts = dict(zip(numbers, (0, *accumulate(lengths))))
    rows, of = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for member, offset, room in zip(piece.members, piece.offsets, piece.rooms):
        number = prompts[member]
        if number is not None:
            first, last = search.spans[number]
            last = min(last, room)  # a first pass may have cut the sequence
            rows.append(torch.arange(offset + first, offset + last))
            of.append(torch.arange(starts[number], starts[number] + last - first))
    return numbers, to_device(torch.cat(rows), device), to_device(torch.cat(of), device)


def searched(place: Place, search: Search) -> dict[int, Deltas]:
    """The rows of the prompts in a piece of the search's sequences, by prompt. Its passes are cut further where the
    piece, which holds whole prompts, is larger than the levers allow.
    """
    parts = place.parts
    numbers, rows, of = perturbed_rows(place.piece, search, search.prompts)
    weight = parts.model.get_input_embeddings().weight
    width = int(weight.shape[1])
    lengths = [search.spans[n][1] - search.spans[n][0] for n in numbers]
    radii = {state: search.radius * parts.unit(state, search.unit_power) for state in search.states}
    wide = torch.promote_types(torch.float32, weight.dtype)
    perturbation = Perturbation(radii, rows, width, of=of, dtype=wide)
    levers, members = place.levers, place.piece.members
    starts = dict(zip(numbers, (0, *accumulate(lengths))))
    losses = []
    for part in split(search.sequences, levers.piece_size(place.stream.name), levers.layout, members):
        piece = make_piece(search.sequences, part, levers.layout, parts.device)
        _, rows, of = perturbed_rows(piece, search, search.prompts, starts)
        here = replace(place, piece=piece, perturbation=Perturbation.fixed(perturbation.deltas, rows, of))
        losses.append(partial(_loss, here))
    with lora_dropout(parts.model, None):
        find_perturbation(losses, perturbation, steps=search.steps, step_size=step_sizes(parts, search, radii, width))
    found = {state: delta.detach().to(weight.dtype).split(lengths) for state, delta in perturbation.deltas.items()}
    return {n: {state: rows[i] for state, rows in found.items()} for i, n in enumerate(numbers)}


def _loss(place: Place, _: object) -> Tensor:
    """What a piece of the search's sequences adds to what is lowered."""
    return adapted_pass(place, [execution_of(term)(term, place) for term in place.stream.terms])


def step_sizes(parts: ModelParts, search: Search, radii: Mapping[int, float], width: int) -> dict[int, float]:
    """The size of a step per coordinate, by hidden state."""
    if search.step_size is None:
        return {state: radius / (FIRST_STEPS * width**0.5) for state, radius in radii.items()}
    return {state: search.step_size * parts.unit(state, search.unit_power) for state in radii}
