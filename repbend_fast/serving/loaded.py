"""A model that is loaded once and asked as both of its sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from repbend_fast.assessment.target import find_subject, limit_prompts, load_base
from repbend_fast.config.overrides import Overlays, Overrides
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.switches import evaluation_mode, reference_model


@dataclass(frozen=True)
class Sides:
    """``model`` with its adapter on, and the encoder of its prompts. ``names``: base, and bent where there is an
    adapter. ``adapter``: its folder or hub name.
    """

    name: str
    model: CausalLM
    encoder: ChatEncoder
    names: tuple[str, ...] = ("base",)
    adapter: str | None = None

    @contextmanager
    def on(self, side: str) -> Iterator[CausalLM]:
        """The model as ``side``, in evaluation mode and without gradients."""
        adapter_off = reference_model(self.model) if side == "base" and "bent" in self.names else nullcontext()
        with evaluation_mode(self.model), adapter_off, torch.no_grad():
            yield self.model

    @property
    def device(self) -> torch.device:
        """Where token ids belong."""
        return find_decoder(self.model).device

    @property
    def positions(self) -> int | None:
        """Tokens of a prompt with its answer that the model has positions for; None where it does not say."""
        return getattr(causal_model(self.model).config.get_text_config(), "max_position_embeddings", None)


def load_sides(
    target: str,
    adapter: str | None = None,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    answer_tokens: int = 256,
) -> Sides:
    """Load what ``target`` names; the arguments are those of :func:`repbend_fast.assessment.target.find_subject`.

    ``answer_tokens``: positions that prompts have to leave for an answer.

    Raises:
        UserError: nothing of that kind is there, or it cannot be loaded.
    """
    subject = find_subject(target, adapter, overrides, overlays=overlays)
    model, encoder = load_base(subject)
    limit_prompts(model, encoder, answer_tokens)
    if subject.bend is not None:
        model = subject.bend(model)
    return Sides(subject.name, model.requires_grad_(False).eval(), encoder, subject.sides, subject.adapter)
