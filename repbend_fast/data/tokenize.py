"""From records to token ids: chat template, BOS exactly once, an exact boundary between prompt and answer, truncation.

The prompt's ids are those of the rendered prompt (assistant header included) tokenised on its own, because generation
feeds exactly these; the answer's ids are a continuation of them, so ``prompt + answer`` has the prompt as its prefix
whatever the tokenizer merges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from repbend_fast.data.reasoning import CLOSE, Unrenderable, as_turn, follow, holds_reasoning, split_reasoning
from repbend_fast.data.records import Message, PairSequence, Record, Sequence
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.data.turns import (
    NOT_RENDERED,
    Unplaced,
    called_texts,
    common,
    earlier_turns,
    moved,
    tools_left_out,
    what_is_left_out,
)
from repbend_fast.errors import UserError, one_line

# Few records carry reasoning, so templates with a reasoning switch are rendered with it off unless
# data.chat_template_kwargs says otherwise; a date taken from the clock would make the ids of a resumed run differ from
# those of the first one.
TEMPLATE_ARGUMENTS: dict[str, object] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_DAY = datetime(2024, 7, 26)
# transformers hands no functions to a template, so its clock is replaced inside of it.
_CLOCK = "{%- macro strftime_now(form) -%}{{ form"
_CLOCK += "".join(f" | replace('%{code}', '{_DAY.strftime(f'%{code}')}')" for code in (*"YmdBbyAaHMSjIp", "-d", "-m"))
_CLOCK += " }}{%- endmacro -%}"
LONG_RECORD = 1 << 15
"""Characters from which a record's ids are kept once they are cut: they are few, and every draw would
tokenise all of its text.
"""
MOST_LONG = 4096
"""Records whose ids are kept, so that a data set of long texts does not fill the memory."""
_PROBE_REQUEST = "Qwertz"
_PROBE_ANSWER = "Zyxwvu"
_ANCHORS = ("\n", "]", ":", "x")


@dataclass
class Truncated:
    """How many encoded texts were longer than allowed. A retain conversation counts once, a pair's prompt once."""

    prompts: int = 0
    answers: int = 0
    retain: int = 0

    def plus(self, other: Truncated) -> Truncated:
        """Both together."""
        return Truncated(self.prompts + other.prompts, self.answers + other.answers, self.retain + other.retain)

    def as_dict(self) -> dict[str, int]:
        """Counts by name, for logs and reports."""
        return {"prompts": self.prompts, "answers": self.answers, "retain": self.retain}


class BeyondEmbeddingError(UserError):
    """A text with a token id that the model's embedding has no row for."""


class ChatEncoder:
    """Encodes records with a tokenizer's own chat template.

    ``max_prompt_tokens`` and ``max_answer_tokens`` count BOS, template tokens and the turn's end. A longer prompt keeps
    its beginning (BOS, template header, start of the text) and its end (end of the text, assistant header) and loses
    its middle: the losses read the last prompt position, so the assistant header has to be there, and the request of a
    wrapped or multi-turn prompt stands at either end. A longer answer keeps its first tokens; a longer retain
    conversation its first ``max_prompt_tokens + max_answer_tokens``.

    BOS stands first exactly once whether the template writes it, the tokenizer would add it, both, or neither; a
    tokenizer without a BOS token gets none. An answer's reasoning and its tool calls are rendered as the template
    renders them (``data.reasoning``, ``data.turns``). ``template_arguments`` go to the template in addition to
    ``TEMPLATE_ARGUMENTS``, or in their place. With ``earlier_turns`` sequences know where the assistant's earlier turns
    are; those of ``retain`` and of pairs do not. ``separator`` is tokenised for pairs.

    Raises ``UserError`` for a tokenizer without a usable chat template and for limits below the template's own length.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        template_arguments: Mapping[str, object] | None = None,
        *,
        earlier_turns: bool = False,
        separator: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.earlier_turns = earlier_turns
        self.template_arguments = dict(template_arguments or {})
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        # Rows of the model's embedding, once they are known.
        self.vocabulary: int | None = None
        self.truncated = Truncated()
        self._left_out: frozenset[str] | None = None
        self._long: dict[Record, tuple[Sequence | PairSequence, Truncated]] = {}
        self._name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {self._name} has no chat template; set model.chat_template=FILE (a Jinja file)"
            )
        self._glue, self._suffix, self._trims = self._learn_answer_form()
        self._turn_end = self._turn_end_of(self._suffix)
        self._head, self._tail = self._learn_prompt_frame()
        self._separator = tuple(self._learn_separator(separator))

    # -- public
    # ------------------------------------------------------------------------------------------------------------------

    def encode(self, record: Record, *, count: bool = True) -> Sequence | PairSequence:
        """Ids of one record: a ``PairSequence`` for role ``pair``, a ``Sequence`` otherwise.

        ``count`` False leaves ``truncated`` as it is. Raises ``UserError`` naming the record when the template cannot
        hold it.
        """
        is_long = characters_of(record) >= LONG_RECORD
        try:
            encoded, cut = (self._long.get(record) if is_long else None) or self._encode(record)
        except BeyondEmbeddingError as error:
            raise UserError(f"{record.origin}: {error}") from error
        if is_long and len(self._long) < MOST_LONG:
            self._long[record] = encoded, cut
        if count:
            self.truncated = self.truncated.plus(cut)
        return encoded

    def _encode(self, record: Record) -> tuple[Sequence | PairSequence, Truncated]:
        """Ids of one record, and what of it was cut."""
        if record.role == "retain":
            whole = self._whole_conversation(record)
            limit = self.max_prompt_tokens + self.max_answer_tokens
            return Sequence(tuple(whole[:limit]), 0), Truncated(retain=int(len(whole) > limit))
        text, answers = self._texts(record)
        full_prompt = self._ids(text)
        uncut = self._with_bos(full_prompt)
        prompt = self._cut_prompt(uncut)
        earlier: tuple[int, ...] = ()
        if self.earlier_turns and record.role != "pair":
            earlier = self._earlier(record, text, full_prompt, len(uncut))
        ids = [self._continuation(text, full_prompt, answer) for answer in answers]
        first, *second = (
            Sequence((*prompt, *answer[: self.max_answer_tokens]), len(prompt), earlier) for answer in ids
        )
        cut = Truncated(int(len(uncut) > len(prompt)), sum(len(answer) > self.max_answer_tokens for answer in ids))
        if not second:
            return first, cut
        return PairSequence(first, second[0], self._separator, self._elsewhere(answers[1], ids[1])), cut

    def prompt_ids(self, messages: Iterable[Message], prefill: str = "", tools: str = "") -> list[int]:
        """Ids that generation starts from: prompt with assistant header, then ``prefill`` (never truncated) as the
        answer's beginning. ``tools``: as of a record, which is rendered alike.

        Raises:
            UserError: the template does not take the messages, or leaves out tools, calls or results.
        """
        turns = tuple(messages)
        self._check_tools("prompt", tools, turns)
        text = self._render_prompt(turns, "prompt", True, tools)
        full_prompt = self._ids(text)
        uncut = self._with_bos(full_prompt)
        ids = self._cut_prompt(uncut)
        self.truncated.prompts += len(ids) < len(uncut)
        return ids + self._continuation(text, full_prompt, self._glue + prefill) if prefill else ids

    def measure(self, record: Record) -> tuple[int, int]:
        """Untruncated lengths in tokens: (prompt, answer), the longer answer of a pair; a retain conversation is (0,
        all).
        """
        if record.role == "retain":
            return 0, len(self._whole_conversation(record))
        text, answers = self._texts(record)
        prompt = self._ids(text)
        return len(self._with_bos(prompt)), max(len(self._continuation(text, prompt, answer)) for answer in answers)

    def check_template(self) -> None:
        """Raises ``UserError`` when the template's own tokens, or BOS, are beyond ``vocabulary``."""
        try:
            self.prompt_ids((Message("user", _PROBE_REQUEST),))
            self._ids(self._turn_end)
        except BeyondEmbeddingError as error:
            raise UserError(f"the chat template of {self._name}: {error}") from error

    def check_renders(self, record: Record) -> None:
        """Raises ``UserError`` naming the record when the template cannot hold its messages, or the reasoning of its
        answers.
        """
        text, _ = self._texts(record)
        if self.earlier_turns and record.role in ("safe", "unsafe"):
            self._earlier(record, text, self._ids(text), len(self._with_bos(self._ids(text))))

    def drops_reasoning(self, record: Record) -> bool:
        """Whether the template leaves out reasoning of earlier turns, as it does when it talks."""
        if not any(CLOSE in m.content for m in record.messages[:-1]):
            return False
        earlier = [m.content for m in record.messages[:-1] if m.role == "assistant" and holds_reasoning(m.content)]
        try:
            prompt, _ = self._texts(record)
        except UserError:
            return False  # a bad record, which is named elsewhere
        return not all(split_reasoning(text)[0] in prompt for text in earlier)

    def fingerprint(self) -> str:
        """Hash of everything besides the records that decides the ids."""
        probe = self._with_bos(self._ids(self._render_prompt((Message("user", _PROBE_REQUEST),), "probe")))
        parts = [
            self.max_prompt_tokens,
            self.max_answer_tokens,
            str(self.tokenizer.chat_template),
            len(self.tokenizer),
            probe,
        ]
        parts += [self.template_arguments] if self.template_arguments else []
        parts += ["earlier turns"] if self.earlier_turns else []
        parts += [self._separator] if self._separator else []
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    # -- template
    # -----------------------------------------------------------------------------------------------------------------

    def _render(self, messages: Iterable[Message], generation: bool, tools: str = "") -> str:
        turns = [as_turn(m, str(self.tokenizer.chat_template)) for m in messages]
        arguments = TEMPLATE_ARGUMENTS | self.template_arguments
        if tools:
            arguments["tools"] = json.loads(tools)
        template = self.tokenizer.chat_template
        if isinstance(template, str) and "strftime_now" in template:
            arguments["chat_template"] = _CLOCK + template
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **arguments)

    def _render_prompt(
        self, messages: tuple[Message, ...], origin: str, generation: bool = True, tools: str = ""
    ) -> str:
        try:
            text = self._render(messages, generation, tools)
        except NOT_RENDERED as error:
            roles = ", ".join(m.role for m in messages)
            raise UserError(
                f"{origin}: the chat template of {self._name} does not take these messages ({roles}): "
                f"{one_line(error)}; "
                "drop them or set model.chat_template=FILE"
            ) from error
        for message in messages:
            # A template that folds a system message into the user's turn keeps its text; one that drops it would train
            # on another prompt.
            if message.role == "system" and message.content.strip() not in text:
                raise UserError(
                    f"{origin}: the chat template of {self._name} drops the system message; remove it from the record "
                    "or set model.chat_template=FILE"
                )
        return text

    def _texts(self, record: Record) -> tuple[str, list[str]]:
        """The rendered prompt, and what follows it for each of the record's answers, the turn's end included."""
        messages, turns = record.context, record.answers
        answers, calls = [turn.content for turn in turns], any(turn.calls for turn in turns)
        self._check_tools(record.origin, record.tools, (*messages, *turns))
        prompt = self._render_prompt(messages, record.origin, True, record.tools)
        if not calls and not any(map(holds_reasoning, answers)):
            return prompt, [self._plain(answer) for answer in answers]
        whole = [self._render_prompt((*messages, turn), record.origin, False, record.tools) for turn in turns]
        try:
            if calls:
                return called_texts(prompt, answers, whole, self._suffix, self._turn_end)
            return follow(prompt, answers, whole, self._suffix, self._turn_end, self._plain)
        except Unrenderable as error:
            held, out = ("tool calls", "write them as text") if calls else ("reasoning", "take the reasoning out")
            raise UserError(
                f"{record.origin}: the chat template of {self._name} cannot hold the {held} in this answer: {error}; "
                f"set data.chat_template_kwargs={{enable_thinking: true}} or model.chat_template=FILE, or {out}"
            ) from error

    def _check_tools(self, origin: str, tools: str, turns: tuple[Message, ...]) -> None:
        """Refuse a conversation with tools that the template would leave out."""
        if not tools and not any(turn.extra or turn.role == "tool" for turn in turns):
            return
        if self._left_out is None:
            self._left_out = tools_left_out(lambda messages, tools: self._render(messages, True, tools))
        missing = what_is_left_out(tools, turns, self._left_out)
        if missing:
            raise UserError(
                f"{origin}: the chat template of {self._name} leaves out {missing}; take a model whose template "
                "renders them, or set model.chat_template=FILE"
            )

    def _earlier(self, record: Record, text: str, ids: list[int], uncut: int) -> tuple[int, ...]:
        """Where the assistant's turns are in the cut prompt of a record; ``uncut``: ids with BOS."""
        try:
            places = earlier_turns(
                lambda messages, header: self._render(messages, header, record.tools),
                record.context,
                text,
                self._turn_end,
            )
        except Unplaced as error:
            raise UserError(
                f"{record.origin}: the assistant's earlier turns cannot be found, which "
                f"objective.loss_mode=assistant_turns reads: {error}; set loss_mode=response_all, or "
                "model.chat_template=FILE"
            ) from error
        # A token on both sides of an edge belongs to what comes behind it.
        edges = (common(self._ids(text[:place]), ids) for turn in places for place in turn)
        positions = [edge + uncut - len(ids) for edge in edges]
        return tuple(moved(positions, *self._cut(uncut)))

    def _plain(self, answer: str) -> str:
        return self._glue + (answer.strip() if self._trims else answer) + self._turn_end

    def _learn_answer_form(self) -> tuple[str, str, bool]:
        """What the template writes between header and answer, what it writes after the answer, and whether it trims the
        answer.
        """
        request = (Message("user", _PROBE_REQUEST),)
        try:
            prompt = self._render(request, True)
            full = self._render((*request, Message("assistant", _PROBE_ANSWER)), False)
            spaced = self._render((*request, Message("assistant", f" {_PROBE_ANSWER} ")), False)
        except NOT_RENDERED as error:
            raise UserError(
                f"the chat template of {self._name} does not render a plain conversation: {one_line(error)}; set "
                "model.chat_template=FILE"
            ) from error
        if _PROBE_REQUEST not in prompt or _PROBE_ANSWER not in full:
            raise UserError(
                f"the chat template of {self._name} leaves out the messages' text; set model.chat_template=FILE"
            )
        before, _, after = full.rpartition(_PROBE_ANSWER)
        # A generation header longer than the training one (an opened reasoning block, say) is what generation sees, so
        # it stays the prompt.
        glue = before[len(prompt) :] if before.startswith(prompt) else ""
        return glue, after, f" {_PROBE_ANSWER} " not in spaced[len(before) :]

    def _learn_separator(self, separator: str) -> list[int]:
        """Ids of the separator before a word: at a text's end many tokenizers make one token of two line breaks."""
        word, joined = self._parted(_PROBE_ANSWER), self._parted(separator + _PROBE_ANSWER)
        return joined[: -len(word)] if joined[-len(word) :] == word else self._parted(separator)

    def _turn_end_of(self, suffix: str) -> str:
        """The suffix up to its first added token, which is where generation stops; without one, the suffix less
        trailing white space.
        """
        added = [str(t) for t in getattr(self.tokenizer, "added_tokens_decoder", {}).values()] or list(
            self.tokenizer.all_special_tokens
        )
        ends = [(suffix.find(t), -len(t)) for t in added if t and t in suffix]
        if not ends:
            return suffix.rstrip()
        start, negative = min(ends)
        return suffix[: start - negative]

    # -- ids
    # ------------------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            number = max(ids)
            raise BeyondEmbeddingError(
                f"token {self.tokenizer.convert_ids_to_tokens(number)} has id {number}, but the model's embedding has "
                f"{self.vocabulary} "
                "rows; take it out, or use the tokenizer that belongs to the model"
            )
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        return [bos, *ids[start:]]

    def _continuation(self, text: str, text_ids: list[int], more: str) -> list[int]:
        """Ids of ``more`` as it follows ``text``, without a dummy prefix that the text does not have."""
        joined = self._ids(text + more)
        if joined[: len(text_ids)] == text_ids:
            return joined[len(text_ids) :]
        # The tokenizer merges across the boundary, but the prompt's ids are fixed.
        return self._parted(more)

    def _parted(self, more: str) -> list[int]:
        """Ids of ``more`` as it follows a text that it does not merge with."""
        for anchor in _ANCHORS:
            alone = self._ids(anchor)
            joined = self._ids(anchor + more)
            if joined[: len(alone)] == alone:
                return joined[len(alone) :]
        return self._ids(more)

    def _elsewhere(self, answer: str, ids: list[int]) -> tuple[tuple[int, ...], ...]:
        """The answer's ids behind a line break and behind a space, where they are others."""
        bare = answer.lstrip(" ")
        ways = (tuple(self._parted(text)[: self.max_answer_tokens]) for text in (bare, f" {bare}"))
        return tuple(way for way in dict.fromkeys(ways) if way != tuple(ids[: self.max_answer_tokens]))

    def _whole_conversation(self, record: Record) -> list[int]:
        text, (answer,) = self._texts(record)
        prompt = self._ids(text)
        return self._with_bos(prompt) + self._continuation(text, prompt, answer)

    # -- truncation
    # ---------------------------------------------------------------------------------------------------------------

    def _learn_prompt_frame(self) -> tuple[int, int]:
        """Tokens that the template puts before and after a single request, BOS and assistant header included."""
        one, other = (
            self._with_bos(self._ids(self._render((Message("user", r),), True))) for r in (_PROBE_REQUEST, "9 + 9?")
        )
        head = common(one, other)
        tail = common(one[::-1], other[::-1])
        if head + tail >= self.max_prompt_tokens:
            raise UserError(
                f"data.max_prompt_tokens={self.max_prompt_tokens} leaves no room for a request: the chat template of "
                f"{self._name} alone "
                f"takes {head + tail} tokens; raise it"
            )
        return head, tail

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        front, removed = self._cut(len(ids))
        return ids[:front] + ids[front + removed :]

    def _cut(self, length: int) -> tuple[int, int]:
        """Of a prompt of so many ids: how many of the first are kept, and how many behind them are not."""
        if length <= self.max_prompt_tokens:
            return length, 0
        room = self.max_prompt_tokens - self._head - self._tail
        return self.max_prompt_tokens - self._tail - room // 2, length - self.max_prompt_tokens


def characters_of(record: Record) -> int:
    """Characters of a record's texts, of a pair with its longer answer."""
    answers = max(len(turn.content) + len(turn.extra) for turn in record.answers)
    return len(record.tools) + sum(len(turn.content) + len(turn.extra) for turn in record.context) + answers
