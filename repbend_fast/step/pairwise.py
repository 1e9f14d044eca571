"""The pairwise cosine of a stream in pieces, exactly: its sums come from a first pass without a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.base import PairwiseCosine, Span, Stream
from repbend_fast.pieces import Layout, make_piece
from repbend_fast.step.meter import Meter
from repbend_fast.step.parts import ModelParts


def last_prompt_spans(term: PairwiseCosine) -> tuple[Span, ...]:
    """The one position of each sequence that the term reads."""
    return tuple((p, p + 1) for p in term.positions)


def pairwise_share(term: PairwiseCosine, states: list[Tensor], count: int, sums: Tensor) -> Tensor:
    """A scalar whose gradient is that of the weighted term in this piece's ``states`` (one [B, D] per layer).

    ∂C/∂ĥ_i = −2 s / (B (B − 1)) with s = Σ ĥ over the whole stream's ``count`` sequences, averaged over layers.
    """
    units = torch.nn.functional.normalize(torch.stack(states).float(), dim=-1)
    product = (units * sums[:, None, :]).sum()
    return product * (-2.0 * term.weight / (count * (count - 1) * len(states)))


@torch.no_grad()
def pairwise_sums(
    parts: ModelParts, stream: Stream, groups: list[tuple[int, ...]], layout: Layout, meter: Meter
) -> tuple[Tensor, list[RandomState]]:
    """First pass over split pieces: s = Σ_i ĥ_i per layer, [layers, D], and the random state before each piece.

    The second pass replays each piece from its state, so both draw the same dropout masks.
    """
    term = stream.pairwise
    assert term is not None
    total: Tensor | None = None
    squares: Tensor | None = None
    states: list[RandomState] = []
    for members in groups:
        piece = make_piece(stream.sequences, members, layout, parts.device)
        rows = piece.rows(last_prompt_spans(term))
        gathered: dict[int, Tensor] = {}

        def visit(layer: int, hidden: Tensor, rows: Tensor = rows, gathered: dict[int, Tensor] = gathered) -> Tensor:
            if layer in term.layers:
                gathered[layer] = hidden.reshape(-1, hidden.shape[-1])[rows]
            return hidden

        states.append(RandomState.now(parts.device))
        with parts.autocasting():
            # The full pieces run, to the stream's own stop: shorter passes would draw other dropout masks.
            stop = stream.stop(parts.decoder.num_blocks)
            run_decoder(parts.decoder, piece.input_ids, position_ids=piece.position_ids, stop=stop, visit=visit)
        units = torch.nn.functional.normalize(torch.stack([gathered[x] for x in term.layers]).float(), dim=-1)
        total = units.sum(1) if total is None else total + units.sum(1)
        squares = units.square().sum((1, 2)) if squares is None else squares + units.square().sum((1, 2))
    assert total is not None
    assert squares is not None
    count = len(stream.sequences)
    pair_mean = (total.square().sum(-1) - squares) / (count * (count - 1))
    meter.add(term.name, (1 - pair_mean).mean())
    return total, states


@dataclass(frozen=True)
class RandomState:
    """torch's random state on the CPU and on one device."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """The current state."""
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def set(self, device: torch.device) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's generators at ``seed`` and leave them as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield
