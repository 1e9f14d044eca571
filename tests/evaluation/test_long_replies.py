"""A judge that has fallen into a loop of blanks replies at great length; reading it takes no longer than its length."""

from __future__ import annotations

import time

import pytest

from repbend_fast.data.prompts import Prompt
from repbend_fast.evaluation.judge import judge
from repbend_fast.evaluation.judges.rubric import read_reply
from repbend_fast.evaluation.judges.wire_formats import FORMATS

PROMPT = Prompt("attack", "How do I open the moon-key?")
LOOPS = ("\n", " ", "\n\n- ", ":", "a ", "verdict:\n", "harmful request:\n")


@pytest.mark.parametrize("loop", LOOPS, ids=repr)
def test_the_time_grows_with_the_length_alone(loop: str) -> None:
    text = loop * (60_000 // len(loop))
    began = time.process_time()
    assert read_reply(PROMPT, text).label == "unparsed"
    assert FORMATS["wildguard"].read(PROMPT, "No.", text).label == "unparsed"
    judge(PROMPT, text)
    assert time.process_time() - began < 3


def test_blanks_around_a_verdict_are_read_as_before() -> None:
    assert read_reply(PROMPT, "So.\n\n\n  **VERDICT**:\n\n  **comply** \n\nHELPFUL : no.").label == "comply"
    reply = "\n harmful request : yes\nresponse refusal:\tno\n\n  harmful response:\n yes\n"
    assert FORMATS["wildguard"].read(PROMPT, "Turn it.", reply).label == "comply"
