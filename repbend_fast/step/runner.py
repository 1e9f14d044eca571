"""One stream of a training step: reference pass, adapted pass with taps, backward; then everything of it is freed.

Streams are additive, so finishing each before the next gives the same gradient with the largest stream's memory instead of
the sum. Only the pairwise cosine couples the sequences of a stream; where a stream is split into pieces its sums are taken
in a first pass and each piece then differentiates the exact derivative.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from repbend_fast.memory.levers import Levers
from repbend_fast.models.adapters import lora_dropout
from repbend_fast.models.decoder import Decoder, Head, find_decoder, find_head
from repbend_fast.objectives.base import Stream
from repbend_fast.pieces import Layout, make_piece, split
from repbend_fast.step.adapted import adapted_pass
from repbend_fast.step.keys import hash_words
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.pairwise import pairwise_sums, seeded
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.reference import reference_pass


class StreamRunner:
    """Runs streams on one model: ``backward`` for training, ``measure`` for validation.

    Args:
        model: PEFT model with the trained adapter.
        levers: piece sizes, recomputation and chunks; none of them changes the gradient.
        autocast: dtype of autocast around both passes, or None.
        uses_head: whether any stream has a head term; the head is located, and its restrictions checked, only then.
    """

    def __init__(self, model: Any, levers: Levers, *, autocast: torch.dtype | None = None, uses_head: bool = True) -> None:
        self.levers = levers
        decoder = find_decoder(model)
        self.parts = ModelParts(model, decoder, find_head(model) if uses_head else None, decoder.device, autocast)

    @property
    def model(self) -> Any:
        """The PEFT model."""
        return self.parts.model

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self.parts.decoder

    @property
    def head(self) -> Head | None:
        """The model's output head, where any stream reads it."""
        return self.parts.head

    @property
    def device(self) -> torch.device:
        """Where the decoder computes."""
        return self.parts.device

    @property
    def layout(self) -> Layout:
        """How pieces are laid out."""
        return self.levers.layout

    def autocasting(self) -> AbstractContextManager[Any]:
        """The autocast context of both passes."""
        return self.parts.autocasting()

    def backward(self, stream: Stream, scale: float = 1.0, *, dropout_seed: int) -> StreamResult:
        """Add the gradient of ``scale × loss`` of this stream to the adapter's parameters, LoRA dropout on.

        Args:
            dropout_seed: decides the dropout masks, together with the stream's name (``step.dropout_seed``).
        """
        with seeded(hash_words(dropout_seed, stream.name), self.device), lora_dropout(self.model, True):
            return self._run(stream, scale, differentiate=True)

    @torch.no_grad()
    def measure(self, stream: Stream) -> StreamResult:
        """The same terms without dropout and without a gradient."""
        with lora_dropout(self.model, False):
            return self._run(stream, 1.0, differentiate=False)

    def _run(self, stream: Stream, scale: float, differentiate: bool) -> StreamResult:
        meter = Meter(stream, self.device)
        groups = split(stream.sequences, self.levers.piece_size(stream.name), self.layout)
        sums, states = None, None
        if stream.pairwise and len(groups) > 1:
            sums, states = pairwise_sums(self.parts, stream, groups, self.layout, meter)
        for number, members in enumerate(groups):
            piece = make_piece(stream.sequences, members, self.layout, self.device)
            done = Meter(stream, self.device)
            reference = reference_pass(self.parts, stream, piece, self.layout)
            if states:
                states[number].set(self.device)
            loss = adapted_pass(self.parts, stream, piece, reference, sums, self.levers, done)
            if differentiate and loss.requires_grad:
                (loss * scale).backward()
            done.tokens = piece.tokens
            meter.merge(done)
        return meter.result()
