"""Wordings, harmless things to ask for, refusals and beginnings for policies that bring none of their own; ordinary
requests are the demo's.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TypedDict

from repbend_fast.data.prompts import Prompt


class Bundled(TypedDict):
    """``bundled.json``. Wordings, allowed things and beginnings by form; no refusal names what was asked for;
    ``system`` asks for a refusal.
    """

    wordings: dict[str, list[str]]
    allowed: dict[str, list[str]]
    refusals: list[str]
    starts: dict[str, list[str]]
    system: str


@cache
def bundled() -> Bundled:
    """All of it."""
    found: Bundled = json.loads((files(__package__) / "bundled.json").read_text(encoding="utf-8"))
    return found


@cache
def ordinary_requests(split: str) -> tuple[str, ...]:
    """Ordinary requests of one split of the demo, without those that are worded like its restricted ones."""
    from repbend_fast.data.demo import training_records

    records = training_records(split)
    worded_alike = {r.messages[0].content for r in records if r.role == "safe" and ":crafts:" in r.origin}
    asked = [r.messages[0].content for r in records if r.role == "retain"]
    return tuple(dict.fromkeys(text for text in asked if text not in worded_alike))


@cache
def ordinary_questions(split: str) -> tuple[Prompt, ...]:
    """Ordinary questions to evaluate with, each with the keywords of a helpful answer."""
    from repbend_fast.data.demo import prompts

    return tuple(prompt for prompt in prompts(split) if prompt.kind == "ordinary")
