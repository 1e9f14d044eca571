"""GCG, greedy coordinate gradient (Zou et al., arXiv 2307.15043): a suffix of real tokens, found one token at a time.

In each step the gradient of the loss with respect to the suffix's one-hot rows ranks replacements: with g the
gradient of the rows [n, D] and E the embedding matrix [V, D], ``(g Eᵀ)[i, v]`` is how the loss changes to first order
when token v stands at place i. Candidates replace ``replace`` random places by random ones of the ``top_k`` best
tokens; the best candidate by its true loss is the next suffix, whether or not it is better than the present one. The
attack's result is the best suffix seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked, Target
from repbend_fast.evaluation.attacks.requests import (
    Suffixed,
    check_settings,
    complying_beginning,
    prompt_seed,
    suffixed,
    uncounted,
    with_suffix,
)
from repbend_fast.evaluation.attacks.room import PassCost, fitting
from repbend_fast.evaluation.attacks.scores import AnswerScore, differentiating
from repbend_fast.evaluation.generate import generate_answers

Profile = Literal["published", "small"]
SIZES: dict[Profile, tuple[int, int, int]] = {"published": (250, 512, 256), "small": (64, 64, 64)}
"""Steps, candidates and top-k of each profile."""


@dataclass(frozen=True)
class GCG:
    """``profile`` gives ``steps``, ``candidates`` and ``top_k`` where they are 0: those published, or ``small`` for
    tiny models.

    ``replace``: places that a candidate changes. ``rows``: the suffix starts as that many "x". ``ascii_only``: no
    token of other letters, as published. A candidate is dropped unless the request with its text gives its tokens
    again: the suffix has to be something that can be typed.
    """

    name: ClassVar[str] = "gcg"
    white_box: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    profile: Profile = "published"
    steps: int = 0
    candidates: int = 0
    top_k: int = 0
    replace: int = 1
    rows: int = 20
    ascii_only: bool = True

    def __post_init__(self) -> None:
        if self.profile not in SIZES:
            raise UserError(f"gcg:profile={self.profile}; known: {', '.join(SIZES)}")
        for field, size in zip(("steps", "candidates", "top_k"), SIZES[self.profile]):
            object.__setattr__(self, field, getattr(self, field) or size)
        counts = {"steps": self.steps, "candidates": self.candidates, "top_k": self.top_k}
        check_settings(self.name, counts | {"replace": self.replace, "rows": self.rows})

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        """One result per prompt: the answer to the request with the suffix that was found."""
        allowed = allowed_tokens(target, ascii_only=self.ascii_only)
        for index, prompt in enumerate(prompts):
            yield self._attacked(target, prompt, index, prompt_seed(seed, prompt), allowed)

    def _attacked(self, target: Target, prompt: Prompt, index: int, seed: int, allowed: Tensor) -> Attacked:
        request = suffixed(target.encoder, prompt, " x" * self.rows, complying_beginning(prompt))
        typed = Typed.behind(target.encoder, prompt, request)
        request = typed.request
        with differentiating(target.model):
            found = self._search(target, request, typed, seed, allowed)
        suffix = typed.text(found.best.tolist())
        each = PassCost.of(target.model).generation(len(request.ids), target.max_new_tokens)
        fitting(target.budget, each, 1, "an answer")
        answer = generate_answers(
            target.model,
            target.encoder,
            [with_suffix(prompt, suffix)],
            max_new_tokens=target.max_new_tokens,
            batch_size=1,
        )
        details = {
            "suffix": suffix,
            "steps": len(found.losses) - 1,
            "first_loss": found.losses[0],
            "last_loss": min(found.losses),
            "dropped": found.dropped,
        }
        return Attacked(index, tuple(answer), details=details)

    def _search(self, target: Target, request: Suffixed, typed: Typed, seed: int, allowed: Tensor) -> Search:
        score = AnswerScore(target, request, "the attack gcg")
        chunks = score.chunks(self.candidates)
        generator = torch.Generator().manual_seed(seed)
        suffix = torch.tensor(request.ids[request.start : request.stop])
        found = Search(suffix, [], 0)
        for step in range(self.steps):
            loss, gradient = score.gradient(score.embed(suffix))
            if step == 0:
                found.losses.append(loss)
            drawn = self._candidates(suffix, replacements(target, gradient, allowed, self.top_k), generator)
            candidates = typed.surviving(drawn)
            found.dropped += len(drawn) - len(candidates)
            if not len(candidates):
                found.losses.append(found.losses[-1])
                continue
            with torch.no_grad():
                scores = chunks.rows(len(candidates), lambda chosen, of=candidates: score(score.embed(of[chosen])))  # type: ignore[misc]
            best = int(torch.nan_to_num(scores, nan=-torch.inf).argmax())
            suffix = candidates[best]
            if -float(scores[best]) < min(found.losses):
                found.best = suffix
            found.losses.append(-float(scores[best]))
        return found

    def _candidates(self, suffix: Tensor, best: Tensor, generator: torch.Generator) -> Tensor:
        """Variants [C, n] of ``suffix`` [n]; ``best`` [n, k] are the tokens to replace each place by."""
        count, places = self.candidates, min(self.replace, len(suffix))
        changed = torch.rand(count, len(suffix), generator=generator).argsort(dim=1)[:, :places]
        rank = torch.randint(best.shape[1], (count, places), generator=generator)
        return suffix.repeat(count, 1).scatter(1, changed, best[changed, rank])


@dataclass
class Search:
    """The best suffix [n] so far, the loss at the start and after each step, and how many candidates were dropped."""

    best: Tensor
    losses: list[float]
    dropped: int


class Typed:
    """Suffixes as text behind a request, and back."""

    def __init__(self, encoder: ChatEncoder, prompt: Prompt, request: Suffixed, joint: str) -> None:
        self.request = request
        self._encoder = encoder
        self._prompt = prompt
        self._joint = joint

    @classmethod
    def behind(cls, encoder: ChatEncoder, prompt: Prompt, request: Suffixed) -> Typed:
        """From the first of the suffix's rows on whose text gives it again: the first one may hold the request's end.

        Some tokenizers write the blank before a word into its token, others lose it at a text's start; the joint
        between request and suffix is the one that works.

        Raises:
            UserError: there is none.
        """
        for start in range(request.start, request.stop):
            for joint in ("", " "):
                typed = cls(encoder, prompt, replace(request, start=start), joint)
                if typed.survives(request.ids[start : request.stop]):
                    return typed
        raise UserError(
            f"prompt {prompt.source_id or prompt.text[:60]!r}: the tokenizer does not give a suffix's tokens back "
            "from its text, so gcg has nothing to try; leave gcg out for this model"
        )

    def text(self, suffix: Sequence[int]) -> str:
        """What a user types behind the request."""
        decode = self._encoder.tokenizer.decode
        return self._joint + str(decode(list(suffix), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def survives(self, suffix: Sequence[int]) -> bool:
        """Whether the request with the suffix's text gives its ids again, and those around it."""
        ids, start, stop = self.request.ids, self.request.start, self.request.stop
        with uncounted(self._encoder):
            request = with_suffix(self._prompt, self.text(suffix)).conversation()
            typed = self._encoder.prompt_ids(request, "", self._prompt.tools)
        return typed == [*ids[:start], *suffix, *ids[stop:]]

    def surviving(self, candidates: Tensor) -> Tensor:
        """The rows of ``candidates`` [C, n] that survive."""
        kept = [self.survives(row) for row in candidates.tolist()]
        return candidates[torch.tensor(kept, dtype=torch.bool)]


def allowed_tokens(target: Target, *, ascii_only: bool) -> Tensor:
    """Ids that a candidate may have: of the embedding, no special or added ones, and with ``ascii_only`` those alone
    whose text is printable ASCII.
    """
    tokenizer = target.encoder.tokenizer
    size = min(len(tokenizer), target.model.get_input_embeddings().weight.shape[0])
    barred = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = tokenizer.batch_decode([[token] for token in range(size)])
    kept = [
        token
        for token, text in enumerate(texts)
        if token not in barred and text and (not ascii_only or (text.isascii() and text.isprintable()))
    ]
    if not kept:
        raise UserError("gcg: the tokenizer has no token that a suffix may have; try gcg:ascii_only=false")
    return torch.tensor(kept)


def replacements(target: Target, gradient: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` allowed tokens [n, k] of each place that lower the loss most, to first order.

    ``gradient``: of the loss, for each row [n, D].
    """
    weight = target.model.get_input_embeddings().weight
    with torch.no_grad():
        slopes = (gradient.to(weight.dtype) @ weight.T)[:, allowed.to(weight.device)]
        best = slopes.topk(min(top_k, len(allowed)), dim=1, largest=False).indices
    return allowed[best.cpu()]
