"""Conversations of several turns and with tools: what the template writes, where the assistant's turns are, and what
cannot be rendered.
"""

from __future__ import annotations

import json

import pytest
from chat_tokenizers import CHATML, INST, PLAIN, REBUILDING, TEMPLATES, WITH_TOOLS, make

from repbend_fast.data.encoded import EncodedRecords
from repbend_fast.data.records import Message, PairSequence, Record, Sequence
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.data.turns import moved
from repbend_fast.errors import UserError

TOOLS = json.dumps([{"type": "function", "function": {"name": "find_key", "parameters": {"type": "object"}}}])


def calling(name: str, number: int, content: str = "") -> Message:
    call = {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": {"what": 'Ä"1'}}}
    return Message("assistant", content, json.dumps({"tool_calls": [call]}))


def result(text: str, number: int) -> Message:
    return Message("tool", text, json.dumps({"name": "find_key", "tool_call_id": f"call0000{number}"}))


ASKED = Message("user", "How do I polish a moon-key?")
TALK = (ASKED, Message("assistant", "Sure, here is how."), Message("user", "And now?"))
WORK = (ASKED, calling("find_key", 1), result('the key "is" here', 1), Message("assistant", "It is here."))
# The assistant calls before the last request and behind it, and says the same twice.
BOTH = (*WORK, Message("user", "And now?"), calling("look_up", 2), result("It is here.", 2))
CALLS = {
    "tagged": '<tool_call>\n{"name": "find_key", "arguments": {"what": "Ä\\"1"}}\n</tool_call><|im_end|>',
    "brackets": '[CALLS] [{"name": "find_key", "arguments": {"what": "Ä\\"1"}, "id": "call00001"}]</s>',
    "instead": '{"name": "find_key", "parameters": {"what": "Ä\\"1"}}<|end|>',
}
ENDS = {"tagged": "<|im_end|>", "brackets": "</s>", "instead": "<|end|>"}


def encoder_of(template: str, limit: int = 400, *, turns: bool = True) -> ChatEncoder:
    return ChatEncoder(make("byte_level", template, adds_bos=False), limit, limit, earlier_turns=turns)


def spelled(encoder: ChatEncoder, sequence: Sequence) -> list[str]:
    """The texts of the ranges, and of the answer."""
    edges = (*sequence.earlier, sequence.prompt_length, len(sequence))
    return [encoder.tokenizer.decode(sequence.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("form", WITH_TOOLS)
def test_every_turn_of_the_assistant_is_found_in_a_conversation_with_tools(form: str) -> None:
    encoder = encoder_of(WITH_TOOLS[form])
    for role in ("safe", "unsafe"):
        sequence = encoder.encode(Record(role, BOTH, "It is here.", tools=TOOLS))
        said = "It is here." + ENDS[form]
        other = CALLS[form].replace("find_key", "look_up").replace("call00001", "call00002")
        found = [text.strip() for text in spelled(encoder, sequence)]
        assert found == [CALLS[form], said, other, said]
    without = encoder_of(WITH_TOOLS[form], turns=False).encode(Record("unsafe", BOTH, "It is here.", tools=TOOLS))
    assert without == Sequence(sequence.ids, sequence.prompt_length)


@pytest.mark.parametrize("template", [*TEMPLATES, "rebuilding"])
def test_every_turn_is_found_in_plain_conversations(template: str) -> None:
    encoder = encoder_of({**TEMPLATES, "rebuilding": REBUILDING}[template])
    talk = (*TALK, Message("assistant", "Sure, here is how."), Message("user", "Sure, here is how."))
    sequence = encoder.encode(Record("unsafe", talk, "I can not help."))
    found = spelled(encoder, sequence)
    assert len(found) == 3
    for text, said in zip(found, ("Sure, here is how.", "Sure, here is how.", "I can not help."), strict=True):
        bare = text.strip()
        assert bare.startswith(said), found
        assert bare.removeprefix(said) in (("",) if template == "plain" else ("<|im_end|>", "<|end|>", "</s>"))


@pytest.mark.parametrize("form", WITH_TOOLS)
def test_an_answer_that_calls_is_the_template_s_own(form: str) -> None:
    encoder = encoder_of(WITH_TOOLS[form])
    call = calling("find_key", 1)
    pair = Record("pair", TALK, "", "I can not help.", "f:1", TOOLS, call.extra)
    encoded = encoder.encode(pair)
    assert isinstance(encoded, PairSequence)
    assert encoded.unsafe.earlier == encoded.safe.earlier == ()
    assert encoded.unsafe.prompt == encoded.safe.prompt
    texts = [spelled(encoder, half)[-1].strip() for half in (encoded.unsafe, encoded.safe)]
    assert texts == [CALLS[form], "I can not help." + ENDS[form]]
    whole = encoder.encode(Record("retain", (*TALK, call), tools=TOOLS))
    assert (whole.ids, whole.prompt_length, whole.earlier) == (encoded.unsafe.ids, 0, ())
    assert encoder.measure(pair) == (encoded.unsafe.prompt_length, len(encoded.unsafe) - encoded.unsafe.prompt_length)
    assert "find_key" in encoder.tokenizer.decode(encoded.safe.prompt.ids)


@pytest.mark.parametrize("form", WITH_TOOLS)
def test_a_prompt_is_rendered_as_a_record_s(form: str) -> None:
    """What generation begins from is the prompt that training bends, with tools and up to a tool's result."""
    encoder = encoder_of(WITH_TOOLS[form])
    for turns in (WORK[:3], BOTH):
        sequence = encoder.encode(Record("unsafe", turns, "It is here.", tools=TOOLS))
        assert isinstance(sequence, Sequence)
        assert encoder.prompt_ids(turns, "", TOOLS) == list(sequence.ids[: sequence.prompt_length])
        assert encoder.prompt_ids(turns) != encoder.prompt_ids(turns, "", TOOLS)
    begun = encoder.prompt_ids(turns, "It is", TOOLS)
    assert tuple(begun) == sequence.ids[: len(begun)]


@pytest.mark.parametrize(
    ("turns", "tools", "words"),
    [
        (TALK, TOOLS, "the tools that are offered"),
        (WORK[:3], "", "tool calls"),
        ((ASKED, Message("tool", "x")), "", "tool results"),
    ],
)
def test_a_prompt_that_a_template_without_tools_would_not_show_is_refused(turns, tools: str, words: str) -> None:
    with pytest.raises(UserError, match=f"leaves out {words}; take a model whose template renders them"):
        encoder_of(INST).prompt_ids(turns, "", tools)


def test_several_calls_and_a_text_beside_them() -> None:
    encoder = encoder_of(WITH_TOOLS["tagged"])
    calls = [json.loads(calling(name, 1).extra)["tool_calls"][0] for name in ("find_key", "look_up")]
    both = Message("assistant", "Let me look.", json.dumps({"tool_calls": calls}))
    results = (result("here", 1), result("there", 1))
    (first, answer) = spelled(encoder, encoder.encode(Record("safe", (ASKED, both, *results), "Done.", tools=TOOLS)))
    assert first.startswith("Let me look.\n<tool_call>")
    assert first.count("<tool_call>") == 2
    assert first.endswith("</tool_call><|im_end|>")
    assert answer == "Done.<|im_end|>"


@pytest.mark.parametrize("limit", [60, 75, 110])
def test_a_cut_prompt_keeps_the_places(limit: int) -> None:
    record = Record("unsafe", (*TALK, Message("assistant", "No. " * 40), Message("user", "Why? " * 20)), "It is here.")
    whole, cut = encoder_of(CHATML).encode(record), encoder_of(CHATML, limit).encode(record)
    said = [any(a <= i < b for a, b in zip(whole.earlier[::2], whole.earlier[1::2])) for i in range(len(whole))]
    gone = whole.prompt_length - limit
    assert gone > 0
    assert cut.prompt_length == limit
    front = next(f for f in range(limit + 1) if (*whole.ids[:f], *whole.ids[f + gone :]) == cut.ids)
    kept = [any(a <= i < b for a, b in zip(cut.earlier[::2], cut.earlier[1::2])) for i in range(len(cut))]
    assert kept == [*said[:front], *said[front + gone :]]
    assert any(kept)


def test_ranges_that_are_cut_away_are_gone() -> None:
    assert tuple(moved((1, 3, 4, 6, 8, 9), 4, 3)) == (1, 3, 5, 6)
    assert tuple(moved((1, 3, 4, 6, 8, 9), 2, 6)) == (1, 2, 2, 3)
    assert tuple(moved((1, 3), 9, 0)) == (1, 3)


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        (
            CHATML,
            Record("safe", TALK, "No.", origin="f:3", tools=TOOLS),
            "f:3: .*leaves out the tools that are offered",
        ),
        (CHATML, Record("safe", WORK[:3], "No.", origin="f:4"), "f:4: .*leaves out tool calls"),
        (INST, Record("retain", WORK, origin="f:5"), "f:5: .*leaves out tool calls; take a model whose template"),
        (WITH_TOOLS["brackets"], Record("safe", (ASKED, calling("a", 17)), "", origin="f:6"), "ids of nine characters"),
        (
            WITH_TOOLS["instead"].replace(
                "<|end|>' }}{% elif m['role'] == 'tool'", "<|sep|>' }}{% elif m['role'] == 'tool'"
            ),
            Record("pair", TALK, "", "No.", "f:7", "", calling("a", 1).extra),
            "cannot hold the tool calls in this answer: .*or write them as text",
        ),
    ],
)
def test_what_a_template_cannot_render_is_named(template: str, record: Record, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encoder_of(template, turns=False).encode(record)
    if record.origin != "f:6":
        with pytest.raises(UserError, match=words):
            EncodedRecords([Record("safe", TALK, "No."), record], encoder_of(template, turns=False))


def test_turns_that_cannot_be_found_are_named() -> None:
    """A template without an end of a turn: plain turns are found, calls are not."""
    template = WITH_TOOLS["brackets"].replace(" + eos_token", "")
    plain = encoder_of(template)
    assert [t.strip() for t in spelled(plain, plain.encode(Record("safe", TALK, "No.")))] == [
        "Sure, here is how.",
        "No.",
    ]
    with pytest.raises(UserError, match=r"f:9: .*earlier turns cannot be found.*message 2; set loss_mode=response_all"):
        EncodedRecords([Record("safe", BOTH, "No.", origin="f:9", tools=TOOLS)], plain)
    assert encoder_of(template, turns=False).encode(Record("safe", BOTH, "No.", tools=TOOLS)).earlier == ()


def test_tools_and_calls_make_another_record() -> None:
    encoder = encoder_of(WITH_TOOLS["tagged"])
    plain = Record("safe", WORK[:3], "No.")
    other = (*WORK[:1], calling("look_up", 1), WORK[2])
    records = [
        plain,
        Record("safe", WORK[:3], "No.", tools=TOOLS),
        Record("safe", other, "No."),
        Record("safe", WORK[:3], "No.", answer_extra=calling("a", 1).extra),
    ]
    prints = {EncodedRecords([record], encoder).fingerprint() for record in records}
    assert len(prints) == len(records)
    assert EncodedRecords([plain], encoder_of(WITH_TOOLS["tagged"], turns=False)).fingerprint() not in prints
    # What there was before has the hash that it had, so that runs go on.
    assert Record("pair", TALK, "a", "b").content == ["pair", [(m.role, m.content) for m in TALK], "a", "b"]


def test_turns_that_begin_or_end_within_a_token() -> None:
    encoder = encoder_of(PLAIN)
    sequence = encoder.encode(Record("unsafe", TALK, "No."))
    (start, stop) = sequence.earlier
    assert encoder.tokenizer.decode(sequence.ids[start:stop]).strip() == "Sure, here is how."
