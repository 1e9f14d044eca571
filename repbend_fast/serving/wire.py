"""OpenAI's wire format, the part that is served: what a request asks for, and the objects of an answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repbend_fast.data.conversation import ROLES, BadField, tool_list, tool_turn
from repbend_fast.data.records import Message
from repbend_fast.serving.engine import Answer, Sampling

DEFAULT_TOKENS = 512
MOST_STOPS = 16
_IGNORED_IF = {
    "n": (1, None),
    "best_of": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "echo": (False, None),
    "suffix": ("", None),
    "tool_choice": ("auto", "none", None),
    "parallel_tool_calls": (True, None),
    "functions": ([], None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "audio": (None,),
}
"""Parameters that are not served, by the values that ask for nothing."""


class Refused(Exception):
    """A request that is answered with an error of OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param, self.code = param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, object]:
        """What is sent."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """What both kinds of request say. ``sampling`` has ``max_tokens`` as asked, None = as many as there are by
    default.
    """

    model: str | None
    stream: bool
    usage: bool
    max_tokens: int | None
    sampling: Sampling


def read_request(body: Mapping[str, object]) -> Request:
    """Check what both kinds of request share.

    Raises:
        Refused: a value of a wrong kind, or something asked for that is not served.
    """
    for name, nothing in _IGNORED_IF.items():
        if name in body and body[name] not in nothing:
            raise Refused(400, f"{name}={body[name]!r:.80} is not served here; leave it out", param=name)
    stops = body.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops) or len(stops) > MOST_STOPS:
        raise Refused(400, f"stop: give a string or a list of at most {MOST_STOPS} strings", param="stop")
    options = body.get("stream_options") or {}
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    return Request(
        _string(body, "model"),
        _flag(body, "stream"),
        isinstance(options, dict) and options.get("include_usage") is True,
        None if most is None else _whole(most, "max_tokens", 1),
        Sampling(
            DEFAULT_TOKENS,
            _number(body, "temperature", 1.0, 0.0, 100.0),
            _number(body, "top_p", 1.0, 1e-6, 1.0),
            tuple(stops),
            None if body.get("seed") is None else _whole(body["seed"], "seed", -(2**63)),
        ),
    )


def read_messages(body: Mapping[str, object]) -> tuple[tuple[Message, ...], str]:
    """A chat's messages, and how its answer is made to begin: the last message, where it is the assistant's and
    ``continue_final_message`` is set.
    """
    raw = body.get("messages")
    if not isinstance(raw, list) or not raw:
        raise Refused(400, "messages: give a list of at least one message", param="messages")
    messages = [_message(entry, f"messages[{i}]") for i, entry in enumerate(raw)]
    if messages[-1].role != "assistant":
        return tuple(messages), ""
    if not _flag(body, "continue_final_message") or len(messages) < 2 or messages[-1].calls:
        raise Refused(
            400,
            "the last message is the assistant's; end with the user's, or set continue_final_message to go on with it",
            param="messages",
        )
    return tuple(messages[:-1]), messages[-1].content


def read_tools(body: Mapping[str, object]) -> str:
    """The tools that a chat offers, as JSON; "" where there are none, or none is to be called.

    Raises:
        Refused: they are no list of tools.
    """
    try:
        tools = tool_list(body)
    except BadField as reason:
        raise Refused(400, f"tools: {reason}", param="tools") from reason
    return "" if body.get("tool_choice") == "none" else tools


def _message(entry: object, where: str) -> Message:
    if not isinstance(entry, dict):
        raise Refused(400, f"{where}: not an object", param=where)
    role = "system" if entry.get("role") == "developer" else entry.get("role")
    if role not in ROLES:
        raise Refused(400, f"{where}.role: {entry.get('role')!r:.80} is none of {', '.join(ROLES)}", param=where)
    content = entry.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and _is_text(part.get("text"))]
        content = "".join(texts) if len(texts) == len(content) else None
    calls = role == "assistant" and entry.get("tool_calls")
    if not isinstance(content, str) and not (calls and entry.get("content") is None):
        raise Refused(400, f"{where}.content: only text is served", param=where)
    if not calls and role != "tool":
        return Message(role, content or "")
    try:
        return tool_turn({**entry, "content": content})
    except BadField as reason:
        raise Refused(400, f"{where}: {reason}", param=where) from reason


def read_prompts(body: Mapping[str, object]) -> list[str | list[int]]:
    """The prompts of a completion: texts, or token ids."""
    if body.get("tools"):
        raise Refused(400, "tools: a chat takes them, a plain completion has no template to render them", param="tools")
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(map(_is_text, prompt)):
            return list(prompt)
        if all(map(_is_id, prompt)):
            return [list(prompt)]
        if all(isinstance(part, list) and part and all(map(_is_id, part)) for part in prompt):
            return [list(part) for part in prompt]
    raise Refused(400, "prompt: give a text, a list of texts, token ids, or a list of these", param="prompt")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _string(body: Mapping[str, object], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(400, f"{name}: give a string", param=name)
    return value


def _flag(body: Mapping[str, object], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name}: give true or false", param=name)
    return bool(value)


def _whole(value: object, name: str, least: int) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise Refused(400, f"{name}: give a whole number from {least} on", param=name)
    return value


def _number(body: Mapping[str, object], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(400, f"{name}: give a number from {least:g} to {most:g}", param=name)
    return float(value)


@dataclass(frozen=True)
class Reply:
    """The objects of one answer. ``chat``: a chat's, else a plain completion's."""

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> Reply:
        """With an id of its own."""
        return cls(chat, model, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, object]:
        """The answers at once, one choice each."""
        choices: list[dict[str, object]] = []
        for i, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            said = {"message": message} if self.chat else {"text": answer.text}
            choices.append({"index": i, "finish_reason": answer.reason, "logprobs": None} | said)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, choices) | {"usage": usage(prompt_tokens, sum(a.tokens for a in answers))}

    def piece(self, text: str | None, reason: str | None = None, *, first: bool = False) -> dict[str, object]:
        """One event of a stream: a piece of text, or with ``reason`` its end."""
        choice: dict[str, object] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            choice["delta"] = delta if text is None else {**delta, "content": text}
        else:
            choice["text"] = text or ""
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def counted(self, prompt_tokens: int, tokens: int) -> dict[str, object]:
        """The event with the counts, for who asked for it: it has no choice."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind, []) | {"usage": usage(prompt_tokens, tokens)}

    def _object(self, kind: str, choices: list[dict[str, object]]) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """OpenAI's counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
