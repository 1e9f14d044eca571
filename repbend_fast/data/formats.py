"""The data formats that users bring, each as a function from one row's fields to records.

``BadField`` says why a row is a bad record. A row that a format leaves out on purpose (an unlabelled one, say) gives no
records.

Our own JSONL, one object per line; fields that are not named here are ignored:

- ``{"role": "safe" | "unsafe", "prompt": TEXT, "answer": TEXT}``
- ``{"role": "pair", "prompt": TEXT, "unsafe_answer": TEXT, "safe_answer": TEXT}``
- ``{"role": "retain", "messages": [...]}`` with the assistant's message last, or ``{"role": "retain", "prompt": TEXT,
"answer": TEXT}``

Everywhere ``"messages": [{"role": "user", "content": TEXT}, ...]`` with the user's message, or a tool's result, last
may stand instead of ``prompt``; of ``safe`` and ``unsafe`` also a whole conversation without ``answer``, whose last
message is the answer. An answer is a text, or an object with ``content``, ``tool_calls`` or both. ``tools`` are what
the conversation offers. ``data/conversation.py`` says how turns may follow each other and how calls are written. An
assistant's reasoning stands in its text, ``<think>…</think>answer``, or in a message's ``reasoning_content`` or
``thinking``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from repbend_fast.data.conversation import (
    BadField,
    Fields,
    answer_turn,
    message_list,
    short,
    text_field,
    tool_list,
)
from repbend_fast.data.records import ROLES, Message, Record, Role

Asked = frozenset[Role] | None
HARM = ("harmful", "unharmful")
REFUSAL = ("refusal", "compliance")
TSV_TYPES = ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign")
HARMFUL_PROMPTS = ("harmful", "vanilla_harmful", "adversarial_harmful")
OTHER_PROMPTS = ("benign", "harmless", "unharmful", "vanilla_benign", "adversarial_benign")


@dataclass(frozen=True)
class Format:
    """How one format is recognised and parsed.

    ``signatures``: a row that has all fields of one of them is of this format. ``roles``: what it can give, each with
    what it takes, if anything. ``parse`` takes a row's fields, its origin, and the roles that the source asks for
    (None: the usual ones); it may return records of other roles too.
    """

    name: str
    signatures: tuple[frozenset[str], ...]
    roles: Mapping[Role, str]
    parse: Callable[[Fields, str, Asked], list[Record]]


def label_field(fields: Fields, key: str, allowed: Iterable[str]) -> str | None:
    """The label under ``key``, None when unlabelled (null, or an empty cell of a table). Raises ``BadField`` for an
    unknown one.
    """
    if key not in fields:
        raise BadField(f"missing field `{key}`")
    value = fields[key]
    if value is None or value == "":
        return None
    if value not in tuple(allowed):
        raise BadField(f"unknown label `{key}` = {short(value)}, expected {' or '.join(allowed)}")
    return value


def parse_wildguardmix(fields: Fields, origin: str, asked: Asked = None) -> list[Record]:
    """Safe: a compliance with an unharmful prompt, or a refusal, both with an unharmful answer. Unsafe: a harmful
    prompt complied with.
    """
    prompt_harm = label_field(fields, "prompt_harm_label", HARM)
    refusal = label_field(fields, "response_refusal_label", REFUSAL)
    response_harm = label_field(fields, "response_harm_label", HARM)
    if prompt_harm is None or refusal is None:
        return []
    role: Role
    if (prompt_harm, refusal) == ("harmful", "compliance"):
        role = "unsafe"
    elif response_harm == "unharmful" and (prompt_harm, refusal) in (
        ("unharmful", "compliance"),
        ("harmful", "refusal"),
    ):
        role = "safe"
    else:
        return []
    return [Record(role, _request(text_field(fields, "prompt")), text_field(fields, "response"), origin=origin)]


def parse_wildjailbreak(fields: Fields, origin: str, asked: Asked = None) -> list[Record]:
    """The RepBend authors' file (harmful prompts with both answers) or the official TSV, whose completions are all
    safe.
    """
    if "data_type" in fields:
        kind = label_field(fields, "data_type", TSV_TYPES)
        if kind is None:
            raise BadField("`data_type` is empty")
        prompt = text_field(fields, "adversarial" if kind.startswith("adversarial") else "vanilla")
        return [Record("safe", _request(prompt), text_field(fields, "completion"), origin=origin)]
    kind = label_field(fields, "prompt_type", (*HARMFUL_PROMPTS, *OTHER_PROMPTS))
    if kind is None:
        raise BadField("`prompt_type` is empty")
    if kind in OTHER_PROMPTS:
        return []
    return _pair_records(fields, origin, asked, "harmful_answer", "harmless_answer")


def parse_circuit_breakers(fields: Fields, origin: str, asked: Asked = None) -> list[Record]:
    """``output`` complies, ``llama3_output`` refuses."""
    return _pair_records(fields, origin, asked, "output", "llama3_output")


def parse_ultrachat(fields: Fields, origin: str, asked: Asked = None) -> list[Record]:
    """Whole conversations to retain."""
    if "messages" not in fields:
        raise BadField("missing field `messages`")
    turns = message_list(fields["messages"], "assistant")
    return [Record("retain", turns, origin=origin, tools=tool_list(fields))]


def parse_jsonl(fields: Fields, origin: str, asked: Asked = None) -> list[Record]:
    """Our own JSONL, as the module's description defines it."""
    role = text_field(fields, "role")
    if role not in ROLES:
        raise BadField(f"unknown role {short(role)}, expected {', '.join(ROLES)}")
    if role == "retain" and "answer" not in fields and "prompt" not in fields:
        return parse_ultrachat(fields, origin)
    tools = tool_list(fields)
    if role != "pair" and "answer" not in fields and "messages" in fields and "prompt" not in fields:
        *context, last = message_list(fields["messages"], "assistant")
        return [Record(role, tuple(context), last.content, origin=origin, tools=tools, answer_extra=last.extra)]
    messages = _own_prompt(fields)
    if role == "pair":
        unsafe, safe = answer_turn(fields, "unsafe_answer"), answer_turn(fields, "safe_answer")
        return [Record("pair", messages, unsafe.content, safe.content, origin, tools, unsafe.extra, safe.extra)]
    answer = answer_turn(fields, "answer")
    if role == "retain":
        return [Record("retain", (*messages, answer), origin=origin, tools=tools)]
    return [Record(role, messages, answer.content, origin=origin, tools=tools, answer_extra=answer.extra)]


def _own_prompt(fields: Fields) -> tuple[Message, ...]:
    if "prompt" in fields and "messages" in fields:
        raise BadField("both `prompt` and `messages` are given, expected one of them")
    if "messages" in fields:
        return message_list(fields["messages"], "user")
    return _request(text_field(fields, "prompt"))


def _pair_records(fields: Fields, origin: str, asked: Asked, unsafe_key: str, safe_key: str) -> list[Record]:
    """The pair, and its halves as unsafe and safe records for a source that asks for these roles."""
    request = _request(text_field(fields, "prompt"))
    unsafe, safe = text_field(fields, unsafe_key), text_field(fields, safe_key)
    pair = Record("pair", request, unsafe, safe, origin)
    if asked is None:
        return [pair]
    return [pair, Record("unsafe", request, unsafe, origin=origin), Record("safe", request, safe, origin=origin)]


def _request(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


_WILDGUARD = (frozenset({"prompt", "prompt_harm_label", "response_refusal_label"}),)
_WILDJAILBREAK = (
    frozenset({"prompt", "harmful_answer", "harmless_answer"}),
    frozenset({"vanilla", "adversarial", "completion", "data_type"}),
)
_CIRCUIT_BREAKERS = (frozenset({"prompt", "output", "llama3_output"}),)
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("jsonl", (frozenset({"role"}),), dict.fromkeys(ROLES, ""), parse_jsonl),
        Format("wildguardmix", _WILDGUARD, {"safe": "", "unsafe": ""}, parse_wildguardmix),
        Format(
            "wildjailbreak",
            _WILDJAILBREAK,
            {"pair": "the authors' jsonl", "unsafe": "the authors' jsonl with roles: [unsafe]", "safe": "official TSV"},
            parse_wildjailbreak,
        ),
        Format(
            "circuit_breakers",
            _CIRCUIT_BREAKERS,
            {"pair": "", "unsafe": "with roles: [unsafe]", "safe": "with roles: [safe]"},
            parse_circuit_breakers,
        ),
        Format("ultrachat", (frozenset({"messages"}),), {"retain": ""}, parse_ultrachat),
    )
}


def formats_that_give(role: Role) -> str:
    """The formats that have records of ``role``, each with what it takes; the user's own form and the
    demo's data last.
    """
    others = [f for f in FORMATS.values() if f.name != "jsonl" and role in f.roles]
    return ", ".join([f"{f.name} ({f.roles[role]})" if f.roles[role] else f.name for f in others] + ["jsonl", "demo"])


def detect_format(names: Iterable[str]) -> Format | None:
    """The format whose signature the field names satisfy, None when there is none."""
    have = set(names)
    return next((f for f in FORMATS.values() if any(s <= have for s in f.signatures)), None)
