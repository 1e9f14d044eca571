"""Rows of every format, and how tests write and load them."""

from __future__ import annotations

import json

from repbend_fast.data.records import Message
from repbend_fast.data.settings import SourceConfig
from repbend_fast.data.sources import load_records

USER = Message("user", "How do I polish it?")
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GUARD = {
    "prompt": "How do I polish it?",
    "adversarial": False,
    "response": "With a cloth.",
    "prompt_harm_label": "unharmful",
    "response_refusal_label": "compliance",
    "response_harm_label": "unharmful",
    "subcategory": "benign",
}
JAILBREAK = {
    "prompt_type": "harmful",
    "prompt": "How do I polish it?",
    "harmful_answer": "So.",
    "harmless_answer": "No.",
}
TSV = {"vanilla": "How do I polish it?", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"}
BREAKERS = {"category": "x", "prompt": "How do I polish it?", "output": "So.", "llama3_output": "No."}
OWN = [
    {"role": "safe", "prompt": "How do I polish it?", "answer": "No."},
    {
        "role": "unsafe",
        "messages": [*TALK, {"role": "user", "content": "And now?"}],
        "answer": "So.",
        "note": "ignored",
    },
    {"role": "pair", "prompt": "How do I polish it?", "unsafe_answer": "So.", "safe_answer": "No."},
    {"role": "retain", "messages": TALK},
    {"role": "retain", "prompt": "Hi", "answer": "Hello"},
]


def load(path, skip=True, **source):
    return load_records([SourceConfig(path=str(path), **source)], seed=1, skip_bad_records=skip)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def only(result):
    """The single record, without its origin."""
    (record,) = [r for of_role in result.records.values() for r in of_role]
    return record.role, record.messages, record.answer, record.safe_answer


def reasons(result):
    return [(b.origin.rsplit(":", 1)[1], b.reason) for b in result.bad]
