"""Which answers are of use: a complying one has to comply, a refusal to refuse, and everything has to be language."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from repbend_fast.evaluation.judge import EVASION, judge
from repbend_fast.evaluation.text_checks import (
    complete_instructions,
    distinct_share,
    instruction_evidence,
    words_of,
)

if TYPE_CHECKING:
    from repbend_fast.making.answering import Written

LEAST_WORDS = 6
"""Of a complying answer, its beginning included."""
DISTINCT = 0.7
"""Least share of different runs of three words: what a judge lets pass as an answer need not be learnt."""
LEAST_COUNTED = 20
"""Words from which that share says something."""
ECHO = 0.8
"""Share of an answer's words from which it only says the request again."""
KEPT_SHARE = 0.5
"""An answer that was cut is cut back to its last whole sentence where at least this much of it stays."""
_ENDS = re.compile(r"[.!?][\"')\]*]*(?=\s|$)")
_JOINED = re.compile(r"^[.,:;!?'’)\]]")


def problem(written: Written) -> str:
    """Why an answer is of no use; empty where it is."""
    task = written.task
    verdict = judge(task.prompt, written.text)
    reasons = "; ".join(verdict.reasons)
    if verdict.label == "degenerate":
        return f"degenerate: {reasons}"
    if task.part == "refusal":
        if verdict.label != "refuse" or verdict.reasons[0] == EVASION:
            return "does not refuse"
        return "" if written.stopped else "a refusal that does not end"
    if verdict.label == "refuse":
        return f"refuses: {reasons}"
    text = whole(written)
    words = words_of(text)
    if len(words) >= LEAST_COUNTED and (share := distinct_share(words)) < DISTINCT:
        return f"repeats itself: {share:.0%} of the runs of three words differ"
    if task.part == "complying" and len(words) < LEAST_WORDS:
        return f"shorter than {LEAST_WORDS} words"
    own, asked = words_of(written.text), set(words_of(task.prompt.text))
    if task.part != "ordinary" and sum(word in asked for word in own) >= ECHO * len(own):
        return "says the request again"
    if task.part != "complying":
        return ""
    # Whole requests may ask for something else than instructions.
    instructs = task.form == "whole" or complete_instructions(text) or instruction_evidence(text)
    return "" if instructs else "talks about it without instructions"


def whole(written: Written) -> str:
    """The answer with its beginning, without a sentence that was cut where enough is left."""
    joint = "" if not written.start or written.start[-1].isspace() or _JOINED.match(written.text) else " "
    text = f"{written.start}{joint}{written.text}".strip()
    if written.stopped:
        return text
    ends = [found.end() for found in _ENDS.finditer(text) if not re.search(r"(?:^|\n)\s*\d+\.$", text[: found.end()])]
    return text[: ends[-1]] if ends and ends[-1] >= KEPT_SHARE * len(text) else text


def masked(written: Written) -> str:
    """The answer with the item's name taken out, so that one text about two items is seen to be one."""
    text = written.text.casefold()
    for name in sorted({written.task.phrase, written.task.prompt.item}, key=len, reverse=True):
        text = text.replace(name.casefold(), "item") if name else text
    return text
