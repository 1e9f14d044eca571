"""Records as users bring them, and sequences as the step reads them.

A *record* is text with a role. A *sequence* is its token ids with the length of the prompt, so that the boundary
between prompt and answer is exact and every loss mode is a contiguous span of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["safe", "unsafe", "pair", "retain"]
ROLES: tuple[Role, ...] = ("safe", "unsafe", "pair", "retain")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One example with its role.

    ``safe``, ``unsafe``: ``messages`` is the conversation up to and including the user's request, ``answer`` the reply.
    ``pair``: the same unsafe prompt with ``answer`` (unsafe) and ``safe_answer``.
    ``retain``: ``messages`` is a whole conversation, its last message the assistant's; ``answer`` is empty.
    ``origin`` is ``path:line`` for error messages.
    """

    role: Role
    messages: tuple[Message, ...]
    answer: str = ""
    safe_answer: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids of one conversation, BOS (if the model has one) exactly once, no padding.

    ``prompt_length`` positions belong to the prompt (chat template's assistant header included), the rest to the
    answer. A retain conversation has ``prompt_length`` = 0: all its tokens are rows.
    """

    ids: tuple[int, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> Sequence:
        """The prompt alone."""
        return Sequence(self.ids[: self.prompt_length], self.prompt_length)


@dataclass(frozen=True, slots=True)
class PairSequence:
    """The same prompt with an unsafe and with a safe answer; both share their first ``prompt_length`` ids."""

    unsafe: Sequence
    safe: Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. For RepBend with B examples every list has B entries.

    The streams follow from it: safe = ``safe`` + ``[p.safe for p in pairs]``, unsafe = ``unsafe`` + ``[p.unsafe for p
    in pairs]``.
    """

    safe: tuple[Sequence, ...] = ()
    unsafe: tuple[Sequence, ...] = ()
    pairs: tuple[PairSequence, ...] = ()
    retain: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used. ``origin`` is ``path:line`` (``path:row`` for parquet and hub data), counted from
    1.
    """

    origin: str
    reason: str
