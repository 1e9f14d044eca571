"""The logit lens: what the model would say next if it stopped at a layer, for every layer and token.

Hidden state *l* goes through the final norm and the head; the last one is normed already. The head is the model's own
forward with its decoder standing aside, so a soft-cap, a scale or an adapted head counts as when the model talks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder, run_decoder
from repbend_fast.models.layers.switches import standing_aside

CHUNK_LOGITS = 1 << 24
"""Logits at once: 64 MB of float32, as against the gigabytes of all layers and tokens."""


@dataclass(frozen=True)
class Reading:
    """Of each layer (rows) and position (columns): the likeliest token, its probability, and the entropy in nats."""

    ids: list[list[int]]
    probabilities: list[list[float]]
    entropies: list[list[float]]


def read_layers(model: CausalLM, ids: list[int], *, last: int | None = None) -> Reading:
    """The lens on one sequence, as the model is now (adapter on or off).

    Args:
        model: a transformers causal LM or a peft model around one, in evaluation mode.
        ids: token ids, BOS included.
        last: read only so many positions at the end; None = all.

    Raises:
        UserError: the model's final norm has a name that is not known.
    """
    decoder = find_decoder(model)
    if decoder.norm_name is None:
        raise UserError(
            f"model type {causal_model(model).config.model_type}: the name of its final norm is not known, and the "
            "lens reads hidden states through it"
        )
    norm = getattr(decoder.body, decoder.norm_name)
    first = 0 if last is None else max(0, len(ids) - last)
    states: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> Tensor:
        shown = hidden[0, first:]
        states.append(shown if layer == decoder.num_blocks else norm(shown))
        return hidden

    with torch.no_grad():
        inputs = torch.tensor([ids], device=decoder.device)
        run_decoder(decoder, inputs, stop=decoder.num_blocks, visit=visit)
        tops, probabilities, entropies = _read(model, decoder.body, torch.cat([s.to(decoder.device) for s in states]))
    shape = (len(states), len(ids) - first)
    return Reading(*(values.reshape(shape).tolist() for values in (tops, probabilities, entropies)))


def _read(model: CausalLM, body: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top token, its probability, and entropy of each of the normed rows [N, D], a chunk of rows at a time."""
    causal = causal_model(model)
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    size = max(1, CHUNK_LOGITS // vocabulary)
    found: list[tuple[Tensor, ...]] = []
    for chunk in rows.split(size):
        with standing_aside(body, chunk[None]):
            logits = causal(inputs_embeds=chunk[None], use_cache=False).logits[0]
        scores = logits.float().log_softmax(-1)
        best, index = scores.max(-1)
        # A token that a model rules out has a score of -inf, and 0 · inf is not 0.
        entropy = -(scores.exp() * scores.clamp(min=torch.finfo(scores.dtype).min)).sum(-1)
        found.append((index.cpu(), best.exp().cpu(), entropy.cpu()))
    tops, probabilities, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tops, probabilities, entropies


@dataclass(frozen=True)
class Panel:
    """One heat map: ``tokens`` are the columns, the last of ``total`` in the sequence, ``words`` the top tokens."""

    side: str
    forced: bool
    total: int
    tokens: list[str]
    words: list[list[str]]
    probabilities: list[list[float]]
    entropies: list[list[float]]

    def as_dict(self) -> dict[str, object]:
        """For a JSON file."""
        return asdict(self)


def read_panel(model: CausalLM, tokenizer: Tokenizer, ids: list[int], last: int, *, side: str, forced: bool) -> Panel:
    """The lens on ``ids`` with words in place of token ids."""
    reading = read_layers(model, ids, last=last)
    words = {token: word_of(tokenizer, token) for row in reading.ids for token in row}
    return Panel(
        side,
        forced,
        len(ids),
        [word_of(tokenizer, token) for token in ids[-last:]],
        [[words[token] for token in row] for row in reading.ids],
        _rounded(reading.probabilities),
        _rounded(reading.entropies),
    )


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in rows]


def word_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as text. One that is a part of a character, or beyond the vocabulary, gets the tokenizer's own name or
    its number.
    """
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token) or f"#{token}")
