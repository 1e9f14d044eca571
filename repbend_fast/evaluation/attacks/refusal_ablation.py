"""Refusal ablation (Arditi et al., arXiv 2406.11717): one direction projected out of all that blocks read and write.

The direction of hidden state l is ``mean(h_l | harmful requests) − mean(h_l | harmless requests)`` at the last prompt
token. Each candidate l is tried on validation prompts; the one is taken under which complying answers are likeliest
among those that move the first token's distribution on harmless prompts by no more than ``kl_limit``. The model answers
with ``h − (h·u) u`` in place of h (``models/ablation.py``); its weights stay as they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from repbend_fast.data.prompts import Prompt, load_prompts
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked, Target
from repbend_fast.evaluation.attacks.requests import answer_ids, check_settings, complying_beginning, uncounted
from repbend_fast.evaluation.attacks.room import PassCost, fitting
from repbend_fast.evaluation.attacks.scores import last_logits, log_probs, padded_left
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.evaluation.halving import Chunks
from repbend_fast.models.ablation import projected_out
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.switches import evaluation_mode
from repbend_fast.models.perturbation import visiting

Ids = tuple[int, ...]


@dataclass(frozen=True)
class RefusalAblation:
    """``harmful`` and ``harmless``: files of prompts to take the direction from, or the bundled ``demo``. Of a file's
    prompts the attacks are harmful and the ordinary ones harmless.

    ``count`` prompts of each give the means and the next ``validation`` choose the hidden state, from 1 up to the share
    ``deepest`` of the depth; ``state`` above 0 sets it instead.
    """

    name: ClassVar[str] = "refusal-ablation"
    white_box: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    harmful: str = "demo"
    harmless: str = "demo"
    count: int = 128
    validation: int = 32
    deepest: float = 0.8
    kl_limit: float = 0.1
    state: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self.name,
            {"count": self.count, "validation": self.validation},
            deepest=self.deepest,
            kl_limit=self.kl_limit,
        )
        if self.deepest > 1:
            raise UserError(f"{self.name}:deepest={self.deepest}; give a share of the depth up to 1")

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        """One answer per prompt. ``seed`` decides which prompts give the direction, and which choose the state."""
        if not prompts:
            return
        requests = Requests(target)
        chosen = self._choose(target.model, requests, self._prompts("harmful", seed), self._prompts("harmless", seed))
        for start in range(0, len(prompts), target.batch_size):
            batch = prompts[start : start + target.batch_size]
            with projected_out(target.model, chosen.direction):
                answers = self._answers(target, requests, batch)
            for offset, answer in enumerate(answers):
                yield Attacked(start + offset, (answer,), details=chosen.details())

    def _answers(self, target: Target, requests: Requests, batch: Sequence[Prompt]) -> list[str]:
        longest = max(len(requests.ids(prompt)) for prompt in batch)
        each = requests.cost.generation(longest, target.max_new_tokens)
        return generate_answers(
            target.model,
            target.encoder,
            batch,
            max_new_tokens=target.max_new_tokens,
            batch_size=fitting(target.budget, each, len(batch), "an answer"),
        )

    def _choose(
        self, model: CausalLM, requests: Requests, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
    ) -> Direction:
        """The direction to take out.

        Raises:
            UserError: ``state`` is none of the model's, or no state tells the prompts apart.
        """
        blocks = find_decoder(model).num_blocks
        if self.state >= blocks or self.state < 0:
            raise UserError(
                f"{self.name}:state={self.state}; this model's hidden states to choose from are 1 … {blocks - 1}"
            )
        asked, held_harmful = _cut(harmful, self.count, self.validation)
        ordinary, held_harmless = _cut(harmless, self.count, self.validation)
        differences = requests.last_states(asked).mean(1) - requests.last_states(ordinary).mean(1)
        deepest = min(blocks - 1, max(1, int(self.deepest * blocks)))
        states = [self.state] if self.state else range(1, deepest + 1)
        plain = requests.first_logits(held_harmless)
        tried = []
        for state in states:
            direction = differences[state]
            if not (torch.isfinite(direction).all() and direction.norm() > 0):
                continue
            with projected_out(model, direction):
                score = requests.complying(held_harmful)
                kl = _divergence(plain, requests.first_logits(held_harmless))
            tried.append(Direction(state, direction, score, kl))
        if not tried:
            raise UserError(f"{self.name}: no hidden state tells harmful from harmless prompts; give other files")
        mild = [d for d in tried if d.kl <= self.kl_limit]
        return max(mild, key=lambda d: d.score) if mild else min(tried, key=lambda d: d.kl)

    def _prompts(self, which: str, seed: int) -> list[Prompt]:
        """The prompts of a setting in an order of ``seed``'s."""
        path, kind = getattr(self, which), "attack" if which == "harmful" else "ordinary"
        known = _demo(which) if path == "demo" else load_prompts(PromptsConfig(path=path))
        found = [p for p in known if p.kind == kind]
        random.Random(seed).shuffle(found)
        if len(found) < 2:
            raise UserError(
                f"{self.name}:{which}={path}: {len(found)} prompts of kind {kind}; give at least 2, one for the "
                "direction and one to choose the hidden state by"
            )
        return found


@dataclass(frozen=True, slots=True)
class Direction:
    """A difference of means, what it is to take it out, and how far that moves harmless prompts."""

    state: int
    direction: Tensor
    score: float
    kl: float

    def details(self) -> dict[str, object]:
        """For the record."""
        return {"state": self.state, "log_prob": self.score, "kl": self.kl, "length": float(self.direction.norm())}


class Requests:
    """Passes over prompts, in batches that fit."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._model = causal_model(target.model)
        self._device = find_decoder(target.model).device
        self.cost = PassCost.of(target.model)

    def ids(self, prompt: Prompt) -> Ids:
        """The prompt up to where its answer begins."""
        with uncounted(self._target.encoder):
            return tuple(self._target.encoder.prompt_ids(prompt.conversation(), "", prompt.tools))

    def last_states(self, prompts: Sequence[Prompt]) -> Tensor:
        """Hidden states [blocks, N, D] at the last prompt token, of each state before the final norm; float32."""
        found: list[Tensor] = []

        def visit(state: int, hidden: Tensor) -> Tensor:
            if state == 0:
                found.clear()
            found.append(hidden[:, -1].float())
            return hidden

        with visiting(self._model, visit):
            rows = self._over([self.ids(p) for p in prompts], 1, lambda *_: torch.stack(found, dim=1))
        return rows.transpose(0, 1)

    def first_logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """Logits [N, V] of the answers' first tokens, float32."""
        return self._over([self.ids(p) for p in prompts], 1, lambda logits, _: logits[:, 0].float())

    def complying(self, prompts: Sequence[Prompt]) -> float:
        """Mean log-probability of a token of a complying beginning, every prompt counting once."""
        pairs = [answer_ids(self._target.encoder, p, complying_beginning(p)) for p in prompts]

        def means(logits: Tensor, chosen: slice) -> Tensor:
            tokens = [torch.tensor([answer], device=logits.device) for _, answer in pairs[chosen]]
            return torch.stack([log_probs(r[None, -t.shape[1] :], t).mean() for r, t in zip(logits, tokens)])

        kept = max(len(answer) for _, answer in pairs)
        return float(self._over([(*ids, *answer[:-1]) for ids, answer in pairs], kept, means).mean())

    def _logits(self, sequences: Sequence[Ids], kept: int) -> Tensor:
        """Logits of the last ``kept`` positions of sequences padded on the left."""
        rows, mask = padded_left([torch.tensor(ids, device=self._device) for ids in sequences])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return last_logits(
            self._model, kept, input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False
        )

    def _over(self, sequences: Sequence[Ids], kept: int, read: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """What ``read`` gives for the logits of each batch, joined; the slice says which sequences they are of."""
        what = f"the attack {RefusalAblation.name} for one prompt"
        each = self.cost.forward(max(map(len, sequences)), kept)
        size = fitting(self._target.budget, each, self._target.batch_size, what)
        chunks = Chunks(size, self._device, what)
        with evaluation_mode(self._model), torch.no_grad():
            return chunks.rows(len(sequences), lambda chosen: read(self._logits(sequences[chosen], kept), chosen))


def _divergence(plain: Tensor, changed: Tensor) -> float:
    """Mean KL(plain ‖ changed) over rows of logits [N, V]."""
    p, q = plain.log_softmax(-1), changed.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _cut(prompts: Sequence[Prompt], count: int, validation: int) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """``count`` for the means and ``validation`` to choose by; where there are not enough for both, half each."""
    count = min(count, max(len(prompts) - validation, len(prompts) // 2))
    return prompts[:count], prompts[count : count + validation]


def _demo(which: str) -> list[Prompt]:
    """The bundled training requests: for fictional restricted things with complying answers, or ordinary questions."""
    from repbend_fast.data import demo

    records = demo.training_records("train")
    if which == "harmless":
        asked = [r for r in records if r.role == "retain" and len(r.messages) == 2]
        return [Prompt("ordinary", r.messages[0].content, source_id=r.origin) for r in asked]
    return [
        Prompt("attack", r.messages[-1].content, source_id=r.origin, target=re.split(r"(?<=[.:!?])\s", r.answer)[0])
        for r in records
        if r.role == "pair"
    ]
