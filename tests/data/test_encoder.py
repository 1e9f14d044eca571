"""Properties of the encoder that every template and tokenizer must keep."""

from __future__ import annotations

import itertools

import pytest
from chat_tokenizers import (
    CHATML,
    CHATML_WITH_BOS,
    DROPPING,
    FOLDING,
    INST,
    PLAIN,
    REASONING,
    TEMPLATES,
    TRIMMING,
    TWO_ENDS,
)

from repbend_fast.data.encoded import EncodedRecords, encode_records
from repbend_fast.data.records import Message, PairSequence, Record
from repbend_fast.data.tokenize import TEMPLATE_ARGUMENTS, ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.objectives.refusal import recovering

KINDS = ("byte_level", "metaspace", "metaspace_legacy")
ASK = (Message("user", "How do I polish a moon-key?"),)
ANSWER = "Sure, here is how you polish it."
PAIR = Record("pair", ASK, ANSWER, "I can not help with that.", "f:1")
EVERY = pytest.mark.parametrize(("kind", "template"), list(itertools.product(KINDS, TEMPLATES)))


def rendered(tokenizer, messages, generation):
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **TEMPLATE_ARGUMENTS)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@EVERY
def test_prompt_is_what_generation_feeds_and_a_prefix_of_both_answers(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, TEMPLATES[template])
    encoder = ChatEncoder(tokenizer, 200, 200)
    pair = encoder.encode(PAIR)
    assert isinstance(pair, PairSequence)
    alone = tokenizer(rendered(tokenizer, ASK, True), add_special_tokens=False)["input_ids"]
    expected = alone if alone[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *alone]
    assert encoder.prompt_ids(ASK) == expected
    for side in (pair.unsafe, pair.safe):
        assert list(side.prompt.ids) == expected
        assert len(side) > side.prompt_length
    assert pair.unsafe.ids != pair.safe.ids


@EVERY
def test_prompt_and_answer_together_spell_the_rendered_conversation(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, TEMPLATES[template], adds_bos=False)
    sequence = ChatEncoder(tokenizer, 200, 200).encode(Record("unsafe", ASK, ANSWER))
    whole = rendered(tokenizer, (*ASK, Message("assistant", ANSWER)), False)
    got = text_of(tokenizer, sequence.ids).removeprefix("<s>")
    # A legacy metaspace tokenizer writes a space after every special token, in the prompt as in training: compared
    # without spaces.
    strip = (lambda t: t.replace(" ", "")) if kind == "metaspace_legacy" else (lambda t: t.strip())
    assert strip(whole.removeprefix("<s>")).startswith(strip(got))
    rest = strip(whole.removeprefix("<s>"))[len(strip(got)) :]
    assert rest.strip() in ("", "</s>")


@EVERY
@pytest.mark.parametrize("separator", ["\n\n", "\n", " [stopped]\n"])
def test_a_separator_is_what_stands_between_a_text_and_the_safe_answer(make_tokenizer, kind, template, separator):
    tokenizer = make_tokenizer(kind, TEMPLATES[template])
    encoder = ChatEncoder(tokenizer, 200, 200, separator=separator)
    pair, plain = encoder.encode(PAIR), ChatEncoder(tokenizer, 200, 200).encode(PAIR)
    assert (pair.unsafe, pair.safe, plain.separator) == (plain.unsafe, plain.safe, ())
    start = 3
    begun = text_of(tokenizer, pair.unsafe.ids[: pair.unsafe.prompt_length + start])
    sequence = recovering(pair, start)
    got = text_of(tokenizer, sequence.ids)
    assert got.startswith(begun)
    assert got[len(begun) :].replace(" ", "") == (
        separator + text_of(tokenizer, pair.safe.ids[pair.safe.prompt_length :])
    ).replace(" ", "")
    assert encoder.fingerprint() != ChatEncoder(tokenizer, 200, 200).fingerprint()


@EVERY
def test_a_start_that_ends_with_the_first_word_of_the_safe_answer_is_gone_on_with(make_tokenizer, kind, template):
    """At the beginning, behind a line break and inside of a line, where many tokenizers have other ids for the word."""
    encoder = ChatEncoder(make_tokenizer(kind, TEMPLATES[template]), 200, 200, separator="\n\n")
    for begun in ("I", "so I", "ok:\n\nI"):
        pair = encoder.encode(Record("pair", ASK, f"{begun} know how it is done.", "I must not say how."))
        answer = pair.unsafe.ids[pair.unsafe.prompt_length :]
        texts = [text_of(encoder.tokenizer, answer[:k]).replace(" ", "") for k in range(len(answer))]
        start = texts.index(begun.replace(" ", ""))
        got = text_of(encoder.tokenizer, recovering(pair, start).ids[pair.unsafe.prompt_length :]).replace(" ", "")
        assert got.startswith(f"{begun} must not say how.".replace(" ", "")), (begun, got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [True, False], ids=["tokenizer-adds", "tokenizer-does-not"])
@pytest.mark.parametrize("template", [CHATML_WITH_BOS, CHATML], ids=["template-adds", "template-does-not"])
def test_bos_exactly_once(make_tokenizer, kind, adds_bos, template):
    tokenizer = make_tokenizer(kind, template, adds_bos=adds_bos)
    encoder = ChatEncoder(tokenizer, 100, 100)
    retain = encoder.encode(Record("retain", (*ASK, Message("assistant", ANSWER))))
    for ids in (encoder.prompt_ids(ASK), encoder.encode(PAIR).unsafe.ids, retain.ids):
        assert ids[0] == tokenizer.bos_token_id
        assert list(ids).count(tokenizer.bos_token_id) == 1


def test_model_without_bos_gets_none(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML, bos=False)
    assert tokenizer.bos_token_id is None
    ids = ChatEncoder(tokenizer, 100, 100).prompt_ids(ASK)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert 1 not in ids


def test_bos_that_also_opens_turns_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    tokenizer.bos_token = "<|im_start|>"
    ids = ChatEncoder(tokenizer, 100, 100).prompt_ids(ASK)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[0] == start
    assert ids[1] != start
    assert ids.count(start) == 2


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (TRIMMING, "<|end|>"), (INST, "</s>"), (TWO_ENDS, "<|im_end|>")],
    ids=["chatml", "trimming", "inst", "two-ends"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_answer_ends_with_the_turn_end_and_nothing_after_it(make_tokenizer, kind, template, end):
    tokenizer = make_tokenizer(kind, template)
    sequence = ChatEncoder(tokenizer, 100, 100).encode(Record("safe", ASK, ANSWER))
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert sequence.ids[-1] == end_id
    assert sequence.ids[sequence.prompt_length :].count(end_id) == 1


def test_answer_has_no_dummy_space_where_the_text_has_none(make_tokenizer):
    tokenizer = make_tokenizer("metaspace", CHATML)
    sequence = ChatEncoder(tokenizer, 100, 100).encode(Record("safe", ASK, ANSWER))
    alone = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone[0]).startswith("▁")
    first = tokenizer.convert_ids_to_tokens(sequence.ids[sequence.prompt_length])
    assert not first.startswith("▁")


def test_answer_keeps_the_space_that_the_template_writes(make_tokenizer):
    tokenizer = make_tokenizer("metaspace", INST)
    encoder = ChatEncoder(tokenizer, 100, 100)
    sequence = encoder.encode(Record("safe", ASK, ANSWER))
    assert tokenizer.convert_ids_to_tokens(sequence.ids[sequence.prompt_length]).startswith("▁")
    assert text_of(tokenizer, encoder.prompt_ids(ASK, "Sure, here")).endswith("[/INST] Sure, here")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_boundary_that_the_tokenizer_would_merge_stays_exact(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind, PLAIN, adds_bos=False)
    encoder = ChatEncoder(tokenizer, 100, 100)
    text = rendered(tokenizer, ASK, True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = tokenizer(text + ANSWER, add_special_tokens=False)["input_ids"]
    assert joined[: len(prompt)] != prompt, "the case is meant to be one that merges"
    sequence = encoder.encode(Record("safe", ASK, ANSWER))
    assert list(sequence.ids[1 : sequence.prompt_length]) == prompt
    tokens = tokenizer.convert_ids_to_tokens(list(sequence.ids[sequence.prompt_length :]))
    assert "".join(tokens).replace("Ġ", " ").replace("▁", " ") == ANSWER


def test_prefill_starts_the_same_answer_that_training_sees(make_tokenizer):
    for template in TEMPLATES.values():
        encoder = ChatEncoder(make_tokenizer(template=template), 100, 100)
        ids = encoder.encode(Record("unsafe", ASK, ANSWER)).ids
        prefilled = encoder.prompt_ids(ASK, "Sure, here is how")
        assert prefilled == list(ids[: len(prefilled)])


def test_reasoning_is_off_in_prompt_and_answer(make_tokenizer):
    tokenizer = make_tokenizer(template=REASONING)
    sequence = ChatEncoder(tokenizer, 100, 100).encode(Record("safe", ASK, ANSWER))
    assert text_of(tokenizer, sequence.prompt.ids).endswith("<think>\n\n</think>\n\n")
    assert text_of(tokenizer, sequence.ids[sequence.prompt_length :]) == ANSWER + "<|im_end|>"


def test_answer_is_trimmed_only_where_the_template_trims(make_tokenizer):
    for template, expected in ((TRIMMING, "Sure<|end|>"), (CHATML, " Sure \n<|im_end|>")):
        tokenizer = make_tokenizer(template=template)
        sequence = ChatEncoder(tokenizer, 100, 100).encode(Record("safe", ASK, " Sure \n"))
        assert text_of(tokenizer, sequence.ids[sequence.prompt_length :]) == expected


def test_retain_is_the_conversation_with_no_prompt(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML_WITH_BOS)
    talk = (
        Message("system", "Be brief."),
        *ASK,
        Message("assistant", ANSWER),
        Message("user", "Why?"),
        Message("assistant", "It shines."),
    )
    sequence = ChatEncoder(tokenizer, 100, 100).encode(Record("retain", talk))
    assert sequence.prompt_length == 0
    assert text_of(tokenizer, sequence.ids) == rendered(tokenizer, talk, False).rstrip()


# -- truncation
# ----------------------------------------------------------------------------------------------------------------------


def test_long_prompt_keeps_both_its_ends_and_the_headers(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML_WITH_BOS)
    words = " ".join(str(i) for i in range(100, 300))
    encoder = ChatEncoder(tokenizer, 60, 100)
    ids = encoder.prompt_ids((Message("user", words),))
    assert len(ids) == 60
    text = text_of(tokenizer, ids)
    assert text.startswith("<s><|im_start|>user\n100 101 102")
    assert text.endswith("298 299<|im_end|>\n<|im_start|>assistant\n")
    assert encoder.truncated.as_dict() == {"prompts": 1, "answers": 0, "retain": 0}


@EVERY
def test_tightest_truncation_keeps_the_whole_frame(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, TEMPLATES[template])
    request = (Message("user", "2 0 " * 100 + "2"),)
    before, after = rendered(tokenizer, request, True).split(request[0].content)
    limit = 60
    while True:
        try:
            cut = ChatEncoder(tokenizer, limit, 10).prompt_ids(request)
        except UserError:
            break
        limit -= 1
    assert len(cut) == limit + 1
    text = text_of(tokenizer, cut).replace(" ", "")
    assert text.removeprefix("<s>").startswith(before.removeprefix("<s>").replace(" ", ""))
    assert text.endswith(after.replace(" ", ""))


def test_prompt_of_just_the_limit_is_untouched(make_tokenizer):
    tokenizer = make_tokenizer()
    free = ChatEncoder(tokenizer, 1000, 10).prompt_ids(ASK)
    exact = ChatEncoder(tokenizer, len(free), 10)
    assert exact.prompt_ids(ASK) == free
    assert exact.truncated.prompts == 0
    shorter = ChatEncoder(tokenizer, len(free) - 1, 10)
    assert len(shorter.prompt_ids(ASK)) == len(free) - 1
    assert shorter.truncated.prompts == 1


def test_truncated_pair_still_shares_its_prompt(make_tokenizer):
    encoder = ChatEncoder(make_tokenizer(), 40, 5)
    pair = encoder.encode(Record("pair", (Message("user", "fox " * 200),), "Sure, " * 30, "No."))
    assert pair.unsafe.prompt == pair.safe.prompt
    assert pair.unsafe.prompt_length == 40
    assert len(pair.unsafe) == 45
    assert encoder.truncated.as_dict() == {"prompts": 1, "answers": 1, "retain": 0}


def test_answer_and_retain_keep_their_first_tokens(make_tokenizer):
    tokenizer = make_tokenizer()
    whole, cut = ChatEncoder(tokenizer, 500, 500), ChatEncoder(tokenizer, 50, 7)
    record = Record("safe", ASK, ANSWER * 5)
    full = whole.encode(record)
    assert cut.encode(record).ids == full.ids[: full.prompt_length + 7]
    talk = Record("retain", (*ASK, Message("assistant", ANSWER * 20)))
    assert cut.encode(talk).ids == whole.encode(talk).ids[:57]
    assert cut.truncated.as_dict() == {"prompts": 0, "answers": 1, "retain": 1}
    assert cut.measure(talk) == (0, len(whole.encode(talk)))
    assert cut.measure(record) == (full.prompt_length, len(full) - full.prompt_length)


def test_limit_below_the_template_is_refused(make_tokenizer):
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens=4 leaves no room"):
        ChatEncoder(make_tokenizer(), 4, 10)


# -- templates that cannot hold a record
# ----------------------------------------------------------------------------------------------

WITH_SYSTEM = Record("safe", (Message("system", "Be brief."), *ASK), ANSWER, origin="data.jsonl:7")


def test_tokenizer_without_template_names_the_remedy(make_tokenizer):
    with pytest.raises(UserError, match=r"has no chat template; set model\.chat_template=FILE"):
        ChatEncoder(make_tokenizer(template=None), 100, 100)


def test_broken_template_names_the_remedy(make_tokenizer):
    with pytest.raises(UserError, match=r"model\.chat_template=FILE"):
        ChatEncoder(make_tokenizer(template="{% for m in messages %}{{ m['content'] }"), 100, 100)


@pytest.mark.parametrize(
    ("template", "words"),
    [(INST, "no system messages"), (DROPPING, "drops the system message")],
    ids=["raises", "drops"],
)
def test_template_without_system_messages_names_the_record(make_tokenizer, template, words):
    encoder = ChatEncoder(make_tokenizer(template=template), 100, 100)
    with pytest.raises(UserError, match=r"^data\.jsonl:7: .*" + words):
        encoder.encode(WITH_SYSTEM)
    with pytest.raises(UserError, match=r"^data\.jsonl:7: "):
        encode_records({"safe": [Record("safe", ASK, ANSWER), WITH_SYSTEM]}, encoder)


def test_template_that_folds_the_system_message_keeps_its_text(make_tokenizer):
    tokenizer = make_tokenizer(template=FOLDING)
    sequence = ChatEncoder(tokenizer, 100, 100).encode(WITH_SYSTEM)
    assert "<|im_start|>user\nBe brief.\n\nHow do I" in text_of(tokenizer, sequence.prompt.ids)


def test_lazily_encoded_records_equal_eager_ones_and_have_a_fingerprint(make_tokenizer):
    encoder = ChatEncoder(make_tokenizer(), 100, 100)
    records = [Record("safe", ASK, f"answer {i}") for i in range(5)]
    lazy = EncodedRecords(records, encoder)
    assert list(lazy) == [encoder.encode(r) for r in records] == lazy[:]
    assert len(lazy) == 5
    other = [*records[:4], Record("safe", ASK, "answer x")]
    prints = {
        lazy.fingerprint(),
        EncodedRecords(other, encoder).fingerprint(),
        EncodedRecords(records[::-1], encoder).fingerprint(),
        EncodedRecords(records, ChatEncoder(make_tokenizer(), 100, 99)).fingerprint(),
        EncodedRecords(records, ChatEncoder(make_tokenizer(template=FOLDING), 100, 100)).fingerprint(),
    }
    assert len(prints) == 5
    assert lazy.fingerprint() == EncodedRecords(list(records), ChatEncoder(make_tokenizer(), 100, 100)).fingerprint()


def test_truncation_is_counted_once_per_record_however_often_it_is_drawn(make_tokenizer):
    encoder = ChatEncoder(make_tokenizer(), 100, 5)
    lazy = EncodedRecords(
        [Record("safe", ASK, "Sure, " * 30), Record("safe", ASK, "No."), Record("safe", ASK, "Yes, " * 30)], encoder
    )
    for _ in range(3):
        assert [len(s) - s.prompt_length for s in (lazy[0], lazy[1], lazy[-1])] == [
            5,
            len(lazy[1]) - lazy[1].prompt_length,
            5,
        ]
    assert encoder.truncated.answers == 2
    with pytest.raises(IndexError):
        lazy[3]


@pytest.mark.parametrize("role", ["unsafe", "pair", "retain"])
def test_a_long_record_is_tokenised_once(make_tokenizer, monkeypatch, role):
    """Its ids are few once they are cut; they and what is counted are those of an encoder that keeps none."""
    request = Message("user", "How do I polish a moon-key at home? " * 1000)
    messages = (request, Message("assistant", ANSWER)) if role == "retain" else (request,)
    record = Record(role, messages, "" if role == "retain" else ANSWER * 9, ANSWER * 8 if role == "pair" else "")
    tokenizer = make_tokenizer()
    texts: list[str] = []
    encoders = [ChatEncoder(tokenizer, 60, 20) for _ in range(2)]
    ids = ChatEncoder._ids
    monkeypatch.setattr(ChatEncoder, "_ids", lambda self, text: texts.append(text) or ids(self, text))
    lazy = EncodedRecords([record], encoders[0])
    first = lazy[0]
    read = len(texts)
    assert [lazy[0], encoders[0].encode(record, count=False), EncodedRecords([record], encoders[0])[0]] == 3 * [first]
    assert len(texts) == read
    monkeypatch.setattr("repbend_fast.data.tokenize.LONG_RECORD", 1 << 40)
    assert [encoders[1].encode(record), encoders[1].encode(record)] == 2 * [first]
    assert len(texts) == 3 * read
    assert encoders[0].truncated == encoders[1].truncated  # two drawings counted by either
    assert any(encoders[0].truncated.as_dict().values())
