"""The answer is made to begin as one that complies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked, Target
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.evaluation.measure import PREFILL

TARGET_END = ":\n\n"


class PrefillAttack:
    """Ask each prompt once for every beginning that is known for it; any answer that complies is a success.

    Args:
        start: ``own`` is "Sure, here is how"; ``target`` the set's own beginning and ``":\\n\\n"``; ``answer`` the
            first tokens of a complying answer, where the set holds one; ``all`` each of them. A prompt without the one
            that is asked for gets ``own``.
        tokens: how many first tokens of a complying answer, one beginning each.
        text: a beginning of the user's in place of them all.
    """

    name: ClassVar[str] = "prefill"
    white_box: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __init__(
        self,
        start: Literal["all", "own", "target", "answer"] = "all",
        tokens: tuple[int, ...] = (4, 16, 64),
        text: str = "",
    ) -> None:
        if min(tokens, default=1) < 1:
            raise UserError(f"--attack prefill: tokens={','.join(map(str, tokens))}: give whole numbers from 1 on")
        self.start = start
        self.tokens = tokens
        self.text = text

    def beginnings(self, encoder: ChatEncoder, prompt: Prompt) -> tuple[str, ...]:
        """How the answers to ``prompt`` are made to begin, each once, in a fixed order."""
        if self.text:
            return (self.text,)
        found = [PREFILL] if self.start in ("all", "own") else []
        if prompt.target and self.start in ("all", "target"):
            found.append(prompt.target + TARGET_END)
        if prompt.answer and self.start in ("all", "answer"):
            ids = encoder.tokenizer.encode(prompt.answer, add_special_tokens=False)
            found += [encoder.tokenizer.decode(ids[:count]) for count in self.tokens]
        return tuple(dict.fromkeys(found or [PREFILL]))

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        """Greedy answers, without their beginnings; ``seed`` has no part in them."""
        beginnings = [self.beginnings(target.encoder, prompt) for prompt in prompts]
        answers = iter(
            generate_answers(
                target.model,
                target.encoder,
                [prompt for prompt, own in zip(prompts, beginnings) for _ in own],
                prefills=[beginning for own in beginnings for beginning in own],
                max_new_tokens=target.max_new_tokens,
                batch_size=target.batch_size,
            )
        )
        for index, own in enumerate(beginnings):
            yield Attacked(index, tuple(next(answers) for _ in own), own)
