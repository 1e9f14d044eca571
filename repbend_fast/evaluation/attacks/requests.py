"""What white-box attacks ask with: how a complying answer begins, and the rows of a request that they may change."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import PromptEncoder
from repbend_fast.evaluation.measure import PREFILL

_PROBE = "Qwertz"


def complying_beginning(prompt: Prompt) -> str:
    """How a complying answer begins: as the set says, else ``PREFILL`` and what the prompt asks for, with its article
    in the request.
    """
    if prompt.target:
        return prompt.target
    if not prompt.item:
        return f"{PREFILL} to do that"
    named = re.search(rf"\b(?:(?:an?|the|some)\s+)?{re.escape(prompt.item)}", prompt.text, re.IGNORECASE)
    return f"{PREFILL} to make {named.group() if named else prompt.item}"


def prompt_seed(seed: int, prompt: Prompt) -> int:
    """A seed of the prompt's own. It follows from the conversation, not from a place in a list, so a run that goes on
    with the prompts that are left draws what an uninterrupted one would.
    """
    turns = [(m.role, m.content) for m in prompt.conversation()]
    return int.from_bytes(hashlib.sha256(repr((seed, turns)).encode()).digest()[:8], "big") >> 1


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with ``suffix`` right behind the text of its last user turn."""
    return prompt.asking(lambda text: text + suffix)


@dataclass(frozen=True, slots=True)
class Suffixed:
    """Ids of a request with a suffix, up to where its answer begins. ``start`` and ``stop`` bound the suffix's rows;
    ``answer`` are the ids of the wanted beginning.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    answer: tuple[int, ...]


def suffixed(encoder: PromptEncoder, prompt: Prompt, suffix: str, beginning: str) -> Suffixed:
    """``prompt`` with ``suffix``, and ``beginning`` as its answer.

    Raises:
        UserError: the tokenizer leaves no row that belongs to the suffix, or the answer has no token.
    """
    with uncounted(encoder):
        request = with_suffix(prompt, suffix).conversation()
        ids = encoder.prompt_ids(request, "", prompt.tools)
        start, stop = _suffix_rows(encoder, prompt, suffix, ids)
        answer = encoder.prompt_ids(request, beginning, prompt.tools)[len(ids) :]
    if start >= stop:
        raise UserError(
            f"prompt {prompt.source_id or prompt.text[:60]!r}: no token of its prompt belongs to the suffix "
            f"{suffix[:40]!r} alone; raise data.max_prompt_tokens, or take this prompt out"
        )
    return Suffixed(tuple(ids), start, stop, _some(answer, beginning))


def answer_ids(encoder: PromptEncoder, prompt: Prompt, beginning: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the prompt up to its answer, and those of ``beginning`` as the answer.

    Raises:
        UserError: the answer has no token.
    """
    with uncounted(encoder):
        ids = encoder.prompt_ids(prompt.conversation(), "", prompt.tools)
        answer = encoder.prompt_ids(prompt.conversation(), beginning, prompt.tools)[len(ids) :]
    return tuple(ids), _some(answer, beginning)


def _some(answer: Sequence[int], beginning: str) -> tuple[int, ...]:
    if not answer:
        raise UserError(f"the tokenizer makes no token of the wanted answer {beginning!r}; give a target with words")
    return tuple(answer)


def _suffix_rows(encoder: PromptEncoder, prompt: Prompt, suffix: str, ids: Sequence[int]) -> tuple[int, int]:
    """First and one past the last row of the suffix.

    They are counted from the end as behind a short request, where nothing is cut: a long prompt loses its middle.
    Where the request's own last word flows into the suffix, they are what the suffix adds to the prompt.
    """
    short = prompt.asking(lambda _: _PROBE)
    asked = (short.conversation(), with_suffix(short, suffix).conversation())
    plain, longer = (encoder.prompt_ids(turns, "", prompt.tools) for turns in asked)
    start, stop = _added_rows(plain, longer)
    if ids[len(ids) - (len(longer) - start) :] == longer[start:]:
        return len(ids) - (len(longer) - start), len(ids) - (len(longer) - stop)
    return _added_rows(encoder.prompt_ids(prompt.conversation(), "", prompt.tools), ids)


def _added_rows(plain: Sequence[int], longer: Sequence[int]) -> tuple[int, int]:
    """Where ``longer`` has what ``plain`` has not: the rows between their common beginning and their common end."""
    shortest = min(len(plain), len(longer))
    start = next((i for i in range(shortest) if plain[i] != longer[i]), shortest)
    end = next((i for i in range(shortest - start) if plain[-1 - i] != longer[-1 - i]), shortest - start)
    return start, len(longer) - end


@contextmanager
def uncounted(encoder: PromptEncoder) -> Iterator[None]:
    """What is encoded inside does not count among the encoder's truncated prompts: an attack encodes one many times."""
    truncated = getattr(encoder, "truncated", None)
    before = truncated.prompts if truncated is not None else 0
    try:
        yield
    finally:
        if truncated is not None:
            truncated.prompts = before


def check_settings(name: str, counts: dict[str, int], **sizes: float) -> None:
    """Refuse what no attack can run with: ``counts`` below 1, ``sizes`` not above 0. Raises ``UserError``."""
    for setting, count in counts.items():
        if count < 1:
            raise UserError(f"{name}:{setting}={count}; give a whole number from 1 on")
    for setting, size in sizes.items():
        if not 0 < size < float("inf"):
            raise UserError(f"{name}:{setting}={size}; give a number above 0")
