"""The prompts as they are: through the chat template, or without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.evaluation.attacks.protocol import Attacked, Target
from repbend_fast.evaluation.generate import PromptEncoder, generate_measured


class DirectAttack:
    """Ask each prompt once.

    Args:
        template: through the chat template. Without it the model continues the bare text: safety training that hangs
            on the template's tokens does not see it coming.
    """

    name: ClassVar[str] = "direct"
    white_box: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __init__(self, template: bool = True) -> None:
        self.template = template

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        """Greedy answers and their lengths; ``seed`` has no part in them."""
        encoder: PromptEncoder = target.encoder if self.template else BareEncoder(target.encoder)
        answers = generate_measured(
            target.model, encoder, prompts, max_new_tokens=target.max_new_tokens, batch_size=target.batch_size
        )
        for index, answer in enumerate(answers):
            yield Attacked(index, (answer.text,), details={"tokens": answer.tokens, "stopped": answer.stopped})


class BareEncoder:
    """Prompts without a chat template: the text of their turns, BOS first where the tokenizer has one."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self.tokenizer: Tokenizer = encoder.tokenizer
        self._limit = encoder.max_prompt_tokens

    def prompt_ids(self, messages: Sequence[Message], prefill: str = "", tools: str = "") -> list[int]:
        """Ids of the turns' texts with a line between them; a longer text keeps its end."""
        text = "\n".join(message.content for message in messages)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)[-self._limit :]
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None or ids[:1] == [bos] else [bos]
        return start + ids + (self.tokenizer.encode(prefill, add_special_tokens=False) if prefill else [])
