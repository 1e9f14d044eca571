"""Conversations as users write them: turns that alternate, tools that are offered, calls and their results.

A turn is ``{"role": ROLE, "content": TEXT}``. One ``system`` turn may come first; then ``user`` and ``assistant``
alternate. An assistant's turn may have ``"tool_calls": [{"function": {"name": NAME, "arguments": {…}}}, …]``, with a
content or without one; the turns that follow it are the results, ``{"role": "tool", "content": TEXT}``, and then the
assistant goes on. ``id`` of a call, and ``name`` and ``tool_call_id`` of a result, are handed on to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from repbend_fast.data.records import Message

Fields = Mapping[str, object]
ROLES = ("system", "user", "assistant", "tool")
FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user",), "calls": ("tool",)}
"""Which roles may follow a turn; "" is the beginning. What follows a tool's result is said in ``_follows``."""


class BadField(ValueError):
    """Why a row cannot be used."""


def text_field(fields: Fields, key: str) -> str:
    """The non-empty text under ``key``. Raises ``BadField`` when it is missing, no text, empty, or not encodable as
    UTF-8.
    """
    if key not in fields:
        raise BadField(f"missing field `{key}`")
    value = fields[key]
    if not isinstance(value, str):
        raise BadField(f"`{key}` is {'null' if value is None else type(value).__name__}, expected text")
    if not value.strip():
        raise BadField(f"`{key}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadField(f"`{key}` is not valid UTF-8") from None
    return value


def message_list(value: object, last: str) -> tuple[Message, ...]:
    """A conversation that ends with role ``last``; where that is ``user``, a tool's result may end it too. Raises
    ``BadField`` when a message is malformed or the roles do not alternate.
    """
    if not isinstance(value, list):
        raise BadField(f"`messages` is {type(value).__name__}, expected a list")
    if not value:
        raise BadField("`messages` is empty")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise BadField(f"message {number} is {type(item).__name__}, expected an object with role and content")
        try:
            messages.append(_message(item))
        except BadField as reason:
            raise BadField(f"message {number}: {reason}") from None
    first = 1 if messages[0].role == "system" else 0
    before = ""
    for number, message in enumerate(messages[first:], first + 1):
        if message.role not in _follows(before):
            raise BadField(f"{_misplaced(message.role, before)} at message {number} ({message.role})")
        before = "calls" if message.calls else message.role
    if not messages[first:] or messages[-1].role not in ((last, "tool") if last == "user" else (last,)):
        raise BadField(f"the last message must be the {last}'s")
    return tuple(messages)


def tool_turn(item: Fields) -> Message:
    """A turn with tool calls, or a tool's result, as it stands alone. Raises ``BadField``."""
    return _message(item)


def answer_turn(fields: Fields, key: str) -> Message:
    """The answer under ``key``: a text, or an object with ``content``, ``tool_calls`` or both. Raises ``BadField``."""
    if not isinstance(fields.get(key), dict):
        return Message("assistant", text_field(fields, key))
    try:
        return _message({**dict(fields[key]), "role": "assistant"})  # type: ignore[call-overload]
    except BadField as reason:
        raise BadField(f"`{key}`: {reason}") from None


def tool_list(fields: Fields) -> str:
    """``tools`` of a row as JSON, "" where there are none: a list of objects, or its JSON text, each with a name,
    with or without ``{"type": "function", "function": {…}}`` around it. Raises ``BadField``.
    """
    value = _parsed(fields.get("tools"), "tools")
    if value is None or value == []:
        return ""
    if not isinstance(value, list):
        raise BadField(f"`tools` is {type(value).__name__}, expected a list")
    tools = []
    for number, tool in enumerate(value, 1):
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict):
            raise BadField(f"tool {number} is {type(inner).__name__}, expected an object with name and parameters")
        try:
            text_field(inner, "name")
        except BadField as reason:
            raise BadField(f"tool {number}: {reason}") from None
        tools.append({"type": "function", "function": inner})
    return json.dumps(tools, ensure_ascii=False)


def tool_names(tools: str) -> list[str]:
    """The names in the JSON of :func:`tool_list`."""
    return [str(tool["function"]["name"]) for tool in json.loads(tools)] if tools else []


def short(value: object) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _message(item: Fields) -> Message:
    role = text_field(item, "role")
    if role not in ROLES:
        raise BadField(f"unknown role {short(role)}, expected system, user, assistant or tool")
    calls = _tool_calls(item) if role == "assistant" else []
    if calls and item.get("content") in (None, ""):
        content = ""
    else:
        content = text_field(item, "content")
    reasoning = item.get("reasoning_content") or item.get("thinking")
    if role == "assistant" and isinstance(reasoning, str) and "</think>" not in content:
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    extra: dict[str, object] = {"tool_calls": calls} if calls else {}
    if role == "tool":
        extra = {key: text_field(item, key) for key in ("name", "tool_call_id") if item.get(key) is not None}
    return Message(role, content, json.dumps(extra, ensure_ascii=False) if extra else "")


def _tool_calls(item: Fields) -> list[object]:
    """The calls of a turn as templates take them, their arguments as objects."""
    value = _parsed(item.get("tool_calls"), "tool_calls")
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadField(f"`tool_calls` is {type(value).__name__}, expected a list")
    calls: list[object] = []
    for number, call in enumerate(value, 1):
        inner = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(inner, dict):
            raise BadField(f"tool call {number} is {type(inner).__name__}, expected an object with name and arguments")
        try:
            name = text_field(inner, "name")
            arguments = _parsed(inner.get("arguments", {}), "arguments")
        except BadField as reason:
            raise BadField(f"tool call {number}: {reason}") from None
        if not isinstance(arguments, dict):
            shown = "null" if arguments is None else type(arguments).__name__
            raise BadField(f"tool call {number}: `arguments` is {shown}, expected an object or its JSON")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", **named, "function": {"name": name, "arguments": arguments}})
    return calls


def _parsed(value: object, key: str) -> object:
    """A value that tables hold as its JSON text; no other text is one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadField(f"`{key}` is text that is not JSON") from None


def _follows(before: str) -> tuple[str, ...]:
    return ("tool", "assistant") if before == "tool" else FOLLOWS[before]


def _misplaced(role: str, before: str) -> str:
    if role == "tool":
        return "a tool's result follows no tool call"
    return "a tool's result is missing" if before == "calls" else "roles do not alternate"
