"""Log-probabilities of an answer, differentiable in what a request's rows hold, and texts that follow such rows.

Shapes: B variants of one request, n changed rows, A tokens of the answer, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Target
from repbend_fast.evaluation.attacks.requests import Suffixed
from repbend_fast.evaluation.attacks.room import PassCost, fitting
from repbend_fast.evaluation.generate import answer_texts, greedy_generation
from repbend_fast.evaluation.halving import Chunks
from repbend_fast.evaluation.kv_cache import in_room, roomy_cache
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.switches import evaluation_mode
from repbend_fast.models.perturbation import visiting
from repbend_fast.step.retreat import OutOfMemory, attempt

if TYPE_CHECKING:
    from transformers import Cache


@contextmanager
def differentiating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode, with a graph where something asks for one, whatever the caller has switched."""
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        yield


class AnswerScore:
    """The mean log-probability of one answer to one request, for any rows in the place of the request's suffix.

    Rows before the suffix run once and are kept as keys and values, where the model's cache allows that.
    Use it inside of ``differentiating``.
    """

    def __init__(self, target: Target, request: Suffixed, what: str) -> None:
        self._model = causal_model(target.model)
        self._device = find_decoder(target.model).device
        self._budget = target.budget
        self._what = what
        self._request = request
        self._cost = PassCost.of(target.model)
        self._embedding = self._model.get_input_embeddings()
        self._answer = torch.tensor(request.answer, device=self._device)
        self._kept = len(request.answer)
        whole = len(request.ids) + self._kept - 1
        self._recompute = self._needs_recompute(whole)
        self._prefix: Cache | None = None if self._recompute else self._run_prefix()
        self._earlier = 0 if self._prefix is None else request.start
        self._tokens = whole - self._earlier
        self._before = self.embed(request.ids[self._earlier : request.start])
        # The last token of the answer is predicted and never read.
        self._after = self.embed((*request.ids[request.stop :], *request.answer[:-1]))

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Embeddings [..., D] of ids, without a graph."""
        with torch.no_grad():
            return self._embedding(torch.as_tensor(ids, dtype=torch.long, device=self._device))

    def start(self) -> Tensor:
        """The rows [n, D] that the suffix's own tokens have, in float32 or wider: steps are finer than the grain of a
        bfloat16 embedding.
        """
        rows = self.embed(self._request.ids[self._request.start : self._request.stop])
        return rows.to(torch.promote_types(torch.float32, rows.dtype))

    def whole(self, rows: Tensor) -> Tensor:
        """The embedded request [B, T, D] with ``rows`` [B, n, D] as its suffix, up to where the answer begins."""
        ids, start, stop = self._request.ids, self._request.start, self._request.stop
        return self._around(self.embed(ids[:start]), rows, self.embed(ids[stop:]))

    def _around(self, before: Tensor, rows: Tensor, after: Tensor) -> Tensor:
        count = len(rows)
        return torch.cat((before.expand(count, -1, -1), rows.to(before.dtype), after.expand(count, -1, -1)), dim=1)

    def __call__(self, rows: Tensor) -> Tensor:
        """Mean log-probability [B] of the answer's tokens with ``rows`` [B, n, D] as the suffix."""
        inputs: dict[str, object] = {"inputs_embeds": self._around(self._before, rows, self._after)}
        if self._prefix is not None:
            inputs["past_key_values"] = repeated(self._prefix, len(rows))
        recompute = visiting(self._model, _unchanged, recompute=True) if self._recompute else nullcontext()
        with recompute:
            logits = last_logits(self._model, self._kept, use_cache=self._prefix is not None, **inputs)
        return log_probs(logits, self._answer.expand(len(rows), -1)).mean(dim=-1)

    def gradient(self, rows: Tensor) -> tuple[float, Tensor]:
        """The loss, minus the score, of ``rows`` [n, D], and its gradient. Blocks are recomputed from the first pass
        that does not fit.
        """
        result = attempt(lambda: self._gradient(rows), self._device)
        if isinstance(result, OutOfMemory) and not self._recompute:
            self._use_recompute()
            result = attempt(lambda: self._gradient(rows), self._device)
        if isinstance(result, OutOfMemory):
            raise UserError(f"out of memory in {self._what} ({result.reason}); shorten the prompts or the target")
        return result

    def _gradient(self, rows: Tensor) -> tuple[float, Tensor]:
        moved = torch.zeros_like(rows, requires_grad=True)
        loss = -self((rows.detach() + moved).unsqueeze(0)).sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        return float(loss.detach()), gradient

    def chunks(self, wanted: int) -> Chunks:
        """Chunks in which variants are scored without a graph."""
        each = self._cost.forward(self._tokens, self._kept, self._earlier)
        room = None if self._budget is None else self._budget - self._cost.cache(self._earlier)
        return Chunks(fitting(room, each, wanted, f"{self._what} for one candidate"), self._device, self._what)

    def _needs_recompute(self, whole: int) -> bool:
        """Whether the graph of one request is beyond the budget. Raises ``UserError`` if recomputing does not help."""
        if self._budget is None or self._cost.backward(whole, self._kept) <= self._budget:
            return False
        fitting(self._budget, self._cost.backward(whole, self._kept, recompute=True), 1, f"{self._what} for one prompt")
        return True

    def _use_recompute(self) -> None:
        request = self._request
        self._recompute, self._prefix, self._earlier = True, None, 0
        self._tokens = len(request.ids) + self._kept - 1
        self._before = self.embed(request.ids[: request.start])

    def _run_prefix(self) -> Cache | None:
        """Keys and values of the rows before the suffix; None where there are none, or the cache cannot be shared."""
        if self._request.start == 0:
            return None
        embedded = self.embed(self._request.ids[: self._request.start]).unsqueeze(0)
        with torch.no_grad():
            cache = self._model(inputs_embeds=embedded, use_cache=True, logits_to_keep=1).past_key_values
        return cache if can_share(cache) else None


def can_share(cache: object) -> bool:
    """Whether a cache holds keys and values alone, which can be repeated for variants that go on from it."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def repeated(cache: Cache, count: int) -> Cache:
    """A copy of a one-sequence cache for ``count`` sequences; the cache itself stays as it is."""
    mine = copy.deepcopy(cache)
    if count > 1:
        mine.batch_repeat_interleave(count)
    return mine


def last_logits(model: CausalLM, count: int, **inputs: object) -> Tensor:
    """Logits [B, ``count``, V] of the last positions of a pass, in the model's dtype."""
    return model(**inputs, logits_to_keep=count).logits[:, -count:]


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, A], in float32 or wider, of ``tokens`` [B, A] under ``logits`` [B, A, V]."""
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    return wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(dim=-1)


def answers_behind(target: Target, embedded: Sequence[Tensor], max_new_tokens: int) -> list[str]:
    """One greedy answer behind each of ``embedded``, [T, D] each, of any lengths; without special tokens.

    Shorter ones are padded on the left. Batches follow the budget, and halve when memory runs out.
    """
    model, tokenizer = causal_model(target.model), target.encoder.tokenizer
    if not embedded:
        return []
    each = PassCost.of(model).generation(max(map(len, embedded)), max_new_tokens)
    size = fitting(target.budget, each, target.batch_size, "an answer")
    chunks = Chunks(size, find_decoder(model).device, "generation behind embeddings")

    def generate(chosen: slice) -> list[str]:
        rows, mask = padded_left([e.detach() for e in embedded[chosen]])
        dtype = model.get_input_embeddings().weight.dtype
        room = in_room(roomy_cache(model, rows.shape[1] + max_new_tokens))
        generated = model.generate(inputs_embeds=rows.to(dtype), attention_mask=mask, **room)
        return answer_texts(model, tokenizer, generated)

    with greedy_generation(model, tokenizer, max_new_tokens):
        return [text for part in chunks.over(len(embedded), generate) for text in part]


def padded_left(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [T, ...] as one [B, longest, ...] with zeros before them, and the mask [B, longest] of what is real."""
    longest = max(map(len, sequences))
    rows = sequences[0].new_zeros((len(sequences), longest, *sequences[0].shape[1:]))
    mask = torch.zeros(len(sequences), longest, dtype=torch.long, device=rows.device)
    for row, sequence in enumerate(sequences):
        rows[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return rows, mask


def _unchanged(_: int, hidden: Tensor) -> Tensor:
    return hidden
