"""Records as users bring them, and sequences as the step reads them.

A *record* is text with a role. A *sequence* is its token ids with the length of the prompt, so that the boundary
between prompt and answer is exact and every loss mode is a few ranges of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["safe", "unsafe", "pair", "retain"]
ROLES: tuple[Role, ...] = ("safe", "unsafe", "pair", "retain")
BEGINNING = 100
"""Characters of a look-alike's answer that training retains, at most."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user``, ``assistant`` or ``tool``.

    ``extra``: a JSON object of the turn's other fields as the chat template takes them, ``tool_calls`` of an assistant,
    ``name`` and ``tool_call_id`` of a tool's result; "" = none. ``content`` of a turn that only calls tools is "".
    """

    role: str
    content: str
    extra: str = ""

    @property
    def calls(self) -> bool:
        """Whether the turn calls tools."""
        return self.role == "assistant" and bool(self.extra)


@dataclass(frozen=True, slots=True)
class Record:
    """One example with its role.

    ``safe``, ``unsafe``: ``messages`` is the conversation up to and including the user's request, ``answer`` the reply.
    ``pair``: the same unsafe prompt with ``answer`` (unsafe) and ``safe_answer``.
    ``retain``: ``messages`` is a whole conversation, its last message the assistant's; ``answer`` is empty.
    ``origin`` is ``path:line`` for error messages. ``tools``: a JSON list of the tools that the template offers; "" =
    none. ``answer_extra``, ``safe_extra``: the answers' ``Message.extra``.
    """

    role: Role
    messages: tuple[Message, ...]
    answer: str = ""
    safe_answer: str = ""
    origin: str = ""
    tools: str = ""
    answer_extra: str = ""
    safe_extra: str = ""

    @property
    def context(self) -> tuple[Message, ...]:
        """The turns before the answer."""
        return self.messages[:-1] if self.role == "retain" else self.messages

    @property
    def answers(self) -> tuple[Message, ...]:
        """The answer as a turn; of a pair the unsafe one, then the safe one."""
        if self.role == "retain":
            return self.messages[-1:]
        first = Message("assistant", self.answer, self.answer_extra)
        return (first, Message("assistant", self.safe_answer, self.safe_extra)) if self.role == "pair" else (first,)

    def taken(self, role: Role) -> Record:
        """The same conversation in another role, with the answer, of a pair the unsafe one, as its answer."""
        answer = self.answers[0]
        return Record(role, self.context, answer.content, "", self.origin, self.tools, answer.extra)

    @property
    def content(self) -> list[object]:
        """All that the model sees of it, as JSON; plain records have no more than they had before there were tools."""
        turns = [(m.role, m.content, m.extra) if m.extra else (m.role, m.content) for m in self.messages]
        extras = [self.tools, self.answer_extra, self.safe_extra]
        return [self.role, turns, self.answer, self.safe_answer, *([extras] if any(extras) else ())]


def has_earlier_turns(record: Record) -> bool:
    """Whether the assistant has said something before the answer."""
    return any(turn.role == "assistant" for turn in record.context)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids of one conversation, BOS (if the model has one) exactly once, no padding.

    ``prompt_length`` positions belong to the prompt (chat template's assistant header included), the rest to the
    answer. A retain conversation has ``prompt_length`` = 0: all its tokens are rows. ``earlier``: the assistant's turns
    in the prompt, headers left out, as ranges of positions (start, stop, start, stop, …); empty where nobody asked for
    them, and in the halves of a pair, which share them.
    """

    ids: tuple[int, ...]
    prompt_length: int
    earlier: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> Sequence:
        """The prompt alone."""
        return Sequence(self.ids[: self.prompt_length], self.prompt_length)


@dataclass(frozen=True, slots=True)
class PairSequence:
    """The same prompt with an unsafe and with a safe answer; both share their first ``prompt_length`` ids.

    ``separator``: ids between the beginning of the unsafe answer and the safe one, where this follows that.
    ``elsewhere``: the safe answer's ids behind a line break or a space, where they are others than behind the prompt.
    """

    unsafe: Sequence
    safe: Sequence
    separator: tuple[int, ...] = ()
    elsewhere: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. For RepBend with B examples every list has B entries.

    The streams follow from it: safe = ``safe`` + ``[p.safe for p in pairs]``, unsafe = ``unsafe`` + ``[p.unsafe for p
    in pairs]``. Of the pairs in ``refused`` the safe answers are learned as refusals, and nothing else.
    """

    safe: tuple[Sequence, ...] = ()
    unsafe: tuple[Sequence, ...] = ()
    pairs: tuple[PairSequence, ...] = ()
    retain: tuple[Sequence, ...] = ()
    refused: tuple[PairSequence, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Examples of a micro-batch: ``examples`` of every role; of ``retain`` and of pairs whose refusals are learned
    another number where one is given. Fewer refusals than ``examples`` are none beyond those of the bent pairs.
    """

    examples: int
    retain: int | None = None
    refusals: int | None = None

    @property
    def further_refusals(self) -> int:
        """Pairs of which only the refusal is learned."""
        return max(0, (self.refusals or 0) - self.examples)

    def of(self, role: Role) -> int:
        """Records of a role; of pairs both kinds."""
        if role == "retain":
            return self.retain or self.examples
        return self.examples + (self.further_refusals if role == "pair" else 0)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used. ``origin`` is ``path:line`` (``path:row`` for parquet and hub data), counted from
    1.
    """

    origin: str
    reason: str


def begun(answer: str) -> str:
    """What a retain record has of a look-alike's answer: the beginning, where a refusal would stand. ``BEGINNING``
    characters at most, up to the end of a word where there is one.
    """
    return answer if len(answer) <= BEGINNING else answer[:BEGINNING].rpartition(" ")[0] or answer[:BEGINNING]
