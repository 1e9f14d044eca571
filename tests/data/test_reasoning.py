"""Answers with their reasoning: rendered as the template renders them, one block, an exact boundary, or one line."""

from __future__ import annotations

import pytest
from chat_tokenizers import ALWAYS, CHANNELS, CHATML, CUTTING, CUTTING_OPEN, MODES, REASONING, REBUILDING
from record_files import load, write_lines
from test_encoder import text_of

from repbend_fast.data.encoded import EncodedRecords
from repbend_fast.data.records import Message, PairSequence, Record
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError

ASK = (Message("user", "How do I polish a moon-key?"),)
USER = "<|im_start|>user\nHow do I polish a moon-key?<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<think>It is fiction.</think>Polish it."
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
BLOCK, EMPTY = "<think>\nIt is fiction.\n</think>\n\n", "<think>\n\n</think>\n\n"
SHORT = "<|start|>How do I polish a moon-key?<|sep|>"
DAY = "<|start|>system<|sep|>2024-07-26<|end|><|start|>user<|sep|>How do I polish a moon-key?<|end|><|start|>assistant"
# Template, its variables, the prompt, the answer with reasoning, the answer without.
FORMS = {
    "rebuilding, off": (REBUILDING, {}, USER, BLOCK + "Polish it.<|im_end|>", EMPTY + "No."),
    "rebuilding, on": (REBUILDING, ON, USER, BLOCK + "Polish it.<|im_end|>", EMPTY + "No."),
    "always": (ALWAYS, {}, USER + "<think>\n", "It is fiction.\n</think>\n\nPolish it.<|im_end|>", "\n</think>\n\nNo."),
    "cutting": (CUTTING, {}, SHORT, THOUGHT + "</s>", "No."),
    "cutting, opened": (CUTTING_OPEN, {}, SHORT + "<think>\n", "It is fiction.</think>Polish it.</s>", "No."),
    "modes, on": (MODES, ON, USER, THOUGHT + "<|im_end|>", "No."),
    "channels": (
        CHANNELS,
        {},
        DAY,
        " thought<|sep|>It is fiction.<|end|><|start|>assistant final<|sep|>Polish it.</s>",
        " final<|sep|>No.",
    ),
    "plain": (CHATML, {}, USER, THOUGHT + "<|im_end|>", "No."),
}


def _texts(tokenizer, sequence):
    """What prompt and answer spell, BOS aside: it stands first and nowhere else."""
    assert sequence.ids.count(tokenizer.bos_token_id) == 1
    assert sequence.ids[0] == tokenizer.bos_token_id
    n = sequence.prompt_length
    return text_of(tokenizer, sequence.ids[1:n]), text_of(tokenizer, sequence.ids[n:])


@pytest.mark.parametrize(("template", "arguments", "prompt", "thought", "plain"), FORMS.values(), ids=FORMS)
def test_one_block_where_the_template_has_it(make_tokenizer, template, arguments, prompt, thought, plain):
    tokenizer = make_tokenizer(template=template)
    encoder = ChatEncoder(tokenizer, 300, 300, arguments)
    for role in ("safe", "unsafe"):
        assert _texts(tokenizer, encoder.encode(Record(role, ASK, THOUGHT))) == (prompt, thought)
    pair = encoder.encode(Record("pair", ASK, THOUGHT, "No."))
    assert isinstance(pair, PairSequence)
    assert _texts(tokenizer, pair.unsafe) == (prompt, thought)
    shared, answer = _texts(tokenizer, pair.safe)
    assert shared == prompt
    assert answer.startswith(plain)
    whole = encoder.encode(Record("retain", (*ASK, Message("assistant", THOUGHT))))
    assert text_of(tokenizer, whole.ids[1:]) == prompt + thought
    if not template.startswith("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|sep|>'"):
        turns = [{"role": "user", "content": ASK[0].content}, {"role": "assistant", "content": THOUGHT}]
        if template == CHANNELS:
            turns[1] = {"role": "assistant", "content": "Polish it.", "thinking": "It is fiction."}
        own = template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
        whole = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=own, **arguments)
        assert (prompt + thought).strip() == whole.strip()


@pytest.mark.parametrize("template", [MODES, REASONING], ids=["modes, off", "always an empty one"])
def test_a_second_block_is_refused_with_file_and_line(make_tokenizer, template):
    encoder = ChatEncoder(make_tokenizer(template=template), 300, 300)
    for record in (
        Record("safe", ASK, THOUGHT, origin="f.jsonl:7"),
        Record("pair", ASK, "No.", THOUGHT, origin="f.jsonl:7"),
        Record("retain", (*ASK, Message("assistant", THOUGHT)), origin="f.jsonl:7"),
    ):
        with pytest.raises(
            UserError, match=r"^f\.jsonl:7: .*reasoning.*data\.chat_template_kwargs=\{enable_thinking: true\}"
        ):
            encoder.encode(record)
        with pytest.raises(
            UserError, match=r"^f\.jsonl:7: "
        ):  # before training, also where an earlier record of this shape is fine
            EncodedRecords([Record("safe", ASK, "No."), record], encoder)


def test_the_setting_decides_what_generation_sees(make_tokenizer):
    tokenizer = make_tokenizer(template=REBUILDING)
    for arguments, header in (({}, EMPTY), (OFF, EMPTY), (ON, ""), ({"enable_thinking": None}, "")):
        encoder = ChatEncoder(tokenizer, 300, 300, arguments)
        assert text_of(tokenizer, encoder.prompt_ids(ASK)[1:]) == USER + header
        record = encoder.encode(Record("safe", ASK, "No."))
        assert list(record.prompt.ids) == encoder.prompt_ids(ASK)
        assert _texts(tokenizer, record)[1] == ("" if header else EMPTY) + "No.<|im_end|>"
    prints = {ChatEncoder(tokenizer, 300, 300, arguments).fingerprint() for arguments in ({}, ON, {"mood": 1})}
    assert len(prints) == 3


def test_reasoning_of_earlier_turns(make_tokenizer):
    talk = (*ASK, Message("assistant", THOUGHT), Message("user", "And then?"), Message("assistant", THOUGHT))
    record = Record("retain", talk, origin="f:1")
    tokenizer = make_tokenizer(template=REBUILDING)
    encoder = ChatEncoder(tokenizer, 300, 300)
    text = text_of(tokenizer, encoder.encode(record).ids)
    assert text.count("It is fiction.") == text.count("<think>") == 1
    assert encoder.drops_reasoning(record)
    assert not encoder.drops_reasoning(Record("retain", talk[:2]))
    assert not ChatEncoder(make_tokenizer(), 300, 300).drops_reasoning(record)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_reasoning_in_a_field_of_its_own(make_tokenizer, tmp_path, field):
    row = {
        "role": "retain",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", field: "It is."}],
    }
    (record,) = load(write_lines(tmp_path / "r.jsonl", [row])).records["retain"]
    tokenizer = make_tokenizer(template=REBUILDING)
    assert "<think>\nIt is.\n</think>\n\nYes.<|im_end|>" in text_of(
        tokenizer, ChatEncoder(tokenizer, 99, 99).encode(record).ids
    )
    tokenizer = make_tokenizer(template=CHANNELS)
    assert "assistant thought<|sep|>It is.<|end|>" in text_of(
        tokenizer, ChatEncoder(tokenizer, 99, 99).encode(record).ids
    )


def test_an_unclosed_block_is_not_doubled(make_tokenizer):
    encoder = ChatEncoder(make_tokenizer(template=REBUILDING), 300, 300)
    with pytest.raises(UserError, match="reasoning"):
        encoder.encode(Record("safe", ASK, "<think>It is", origin="f:1"))


def test_the_day_is_not_the_clocks(make_tokenizer):
    """Ids of a run that is resumed on another day are the same."""
    tokenizer = make_tokenizer(template=CHANNELS)
    assert "system<|sep|>2024-07-26<|end|>" in text_of(tokenizer, ChatEncoder(tokenizer, 99, 99).prompt_ids(ASK))
    tokenizer = make_tokenizer(template=CHANNELS.replace("%Y-%m-%d", "%A, %-d %B %y"))
    assert "system<|sep|>Friday, 26 July 24<|end|>" in text_of(
        tokenizer, ChatEncoder(tokenizer, 99, 99).prompt_ids(ASK)
    )
