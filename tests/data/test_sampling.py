"""Sampling: epochs, determinism, resuming, refusal of other data; held-out records."""

from __future__ import annotations

import json

import pytest

from repbend_fast.data.encoded import encode_records
from repbend_fast.data.records import BatchSizes, Message, PairSequence, Record, Sequence
from repbend_fast.data.sampling import BatchSampler, split_holdout
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError

ALL = ("safe", "unsafe", "pair", "retain")


def sequences(count, base):
    return [Sequence((base, base + i, i), 1) for i in range(count)]


def make_sets(safe=7, unsafe=5, pair=6, retain=11):
    pairs = [PairSequence(a, b) for a, b in zip(sequences(pair, 300), sequences(pair, 400), strict=True)]
    return {
        "safe": sequences(safe, 100),
        "unsafe": sequences(unsafe, 200),
        "pair": pairs,
        "retain": sequences(retain, 500),
    }


def sampler(seed=3, examples=2, roles=ALL, retain_examples=None, refusal_examples=None, **sizes):
    return BatchSampler(make_sets(**sizes), BatchSizes(examples, retain_examples, refusal_examples), seed, roles)


def batches(source, count):
    return [source.next_batch() for _ in range(count)]


def test_every_epoch_holds_every_example_once_and_in_another_order():
    source = sampler(examples=1)
    drawn = [b.safe[0] for b in batches(source, 21)]
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(s.ids for s in epoch) == sorted(s.ids for s in sequences(7, 100))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_have_the_asked_size_even_across_epochs():
    for batch in batches(sampler(examples=4), 9):
        assert [len(x) for x in (batch.safe, batch.unsafe, batch.pairs, batch.retain)] == [4, 4, 4, 4]
        assert all(isinstance(p, PairSequence) for p in batch.pairs)


def test_retain_may_have_examples_of_its_own():
    drawn = batches(sampler(retain_examples=5), 9)
    assert {tuple(len(x) for x in (b.safe, b.unsafe, b.pairs, b.retain)) for b in drawn} == {(2, 2, 2, 5)}
    in_turn = [sequence for batch in drawn for sequence in batch.retain]
    assert [sequence for batch in batches(sampler(), 22) for sequence in batch.retain] == in_turn[:44]
    assert [b.safe for b in drawn] == [b.safe for b in batches(sampler(), 9)]


def test_refusals_may_be_learned_of_more_pairs_than_are_bent():
    drawn = batches(sampler(refusal_examples=5), 9)
    assert {(len(b.pairs), len(b.refused)) for b in drawn} == {(2, 3)}
    in_turn = [pair for batch in drawn for pair in (*batch.pairs, *batch.refused)]
    assert [pair for batch in batches(sampler(), 22) for pair in batch.pairs] == in_turn[:44]
    assert [(b.safe, b.unsafe, b.retain) for b in drawn] == [
        (b.safe, b.unsafe, b.retain) for b in batches(sampler(), 9)
    ]
    assert {b.refused for b in batches(sampler(), 9)} == {()}


def test_order_depends_on_seed_and_role_alone():
    assert batches(sampler(), 10) == batches(sampler(), 10)
    assert batches(sampler(), 10) != batches(sampler(seed=4), 10)
    alone = [b.safe for b in batches(sampler(roles=("safe",)), 10)]
    assert alone == [b.safe for b in batches(sampler(retain=3), 10)]
    order = [
        [s.ids[2] for s in drawn]
        for drawn in zip(*[(b.safe[0], b.unsafe[0]) for b in batches(sampler(safe=9, unsafe=9), 9)], strict=True)
    ]
    assert order[0] != order[1]


def test_roles_that_are_not_required_are_not_drawn():
    batch = sampler(roles=("unsafe", "retain"), safe=0).next_batch()
    assert (batch.safe, batch.pairs) == ((), ())
    assert len(batch.unsafe) == len(batch.retain) == 2


@pytest.mark.parametrize("taken", [0, 1, 3, 8, 20])
def test_resuming_gives_the_same_batches(taken):
    source = sampler()
    batches(source, taken)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = sampler()
    resumed.load_state_dict(state)
    assert batches(resumed, 25) == batches(source, 25)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"safe": 8}, "data, tokenizer or token limits differ"),
        ({"roles": ("safe", "unsafe")}, "data, tokenizer or token limits differ"),
        ({"seed": 4}, r"training\.seed=4, but the checkpoint was written with 3"),
        ({"examples": 3}, r"training\.examples=3, but the checkpoint was written with 2"),
        ({"retain_examples": 5}, r"training\.retain_examples=5, but the checkpoint was written with 2"),
        ({"refusal_examples": 5}, r"training\.refusal_examples=5, but the checkpoint was written with 2"),
    ],
)
def test_resuming_on_something_else_is_refused(other, words):
    state = sampler().state_dict()
    with pytest.raises(UserError, match="cannot resume: " + words):
        sampler(**other).load_state_dict(state)


@pytest.mark.parametrize("key", ["retain_examples", "refusal_examples"])
def test_a_checkpoint_from_before_a_role_had_a_number_of_its_own_is_resumed(key):
    source = sampler()
    batches(source, 3)
    state = source.state_dict()
    del state[key]
    resumed = sampler()
    resumed.load_state_dict(state)
    assert batches(resumed, 9) == batches(source, 9)
    with pytest.raises(UserError, match=rf"training\.{key}=5, but the checkpoint was written with 2"):
        sampler(**{key: 5}).load_state_dict(state)


def test_one_changed_token_changes_the_fingerprint():
    sets = make_sets()
    sets["pair"][2] = PairSequence(sets["pair"][2].unsafe, Sequence((400, 402, 3), 1))
    assert BatchSampler(sets, BatchSizes(2), 3, ALL).fingerprint() != sampler().fingerprint()


def test_required_role_without_records_names_the_formats_that_give_it():
    with pytest.raises(
        UserError,
        match=r"no `retain` records, which the objective needs; formats that give them: ultrachat, jsonl, demo",
    ):
        sampler(retain=0)
    with pytest.raises(UserError, match="no `pair` records"):
        BatchSampler({"safe": sequences(2, 1)}, BatchSizes(1), 1, ("safe", "pair"))


def test_lazily_encoded_records_resume_and_are_refused_when_changed(make_tokenizer):
    encoder = ChatEncoder(make_tokenizer(), 60, 20)

    def build(answers):
        records = {"safe": [Record("safe", (Message("user", "How?"),), a) for a in answers]}
        return BatchSampler(encode_records(records, encoder), BatchSizes(2), 3, ("safe",))

    source = build("abcde")
    batches(source, 4)
    resumed = build("abcde")
    resumed.load_state_dict(source.state_dict())
    assert batches(resumed, 5) == batches(source, 5)
    with pytest.raises(UserError, match="cannot resume"):
        build("abcdx").load_state_dict(source.state_dict())


# -- holdout
# ----------------------------------------------------------------------------------------------------------------------


def record(role, request, answer="No."):
    if role == "retain":
        return Record("retain", (Message("user", request), Message("assistant", answer)), origin="f:1")
    return Record(role, (Message("user", request),), answer, answer if role == "pair" else "", "f:1")


def make_records(count=20):
    return {role: [record(role, f"{role} {i}") for i in range(count)] for role in ALL}


def test_holdout_is_disjoint_complete_and_deterministic():
    records = make_records()
    training, held = split_holdout(records, 4, 1)
    for role in ALL:
        assert len(held[role]) == 4
        assert len(training[role]) == 16
        assert set(held[role]) | set(training[role]) == set(records[role])
        assert training[role] == [r for r in records[role] if r in set(training[role])]
    assert split_holdout(records, 4, 1) == (training, held)
    assert split_holdout(records, 4, 2)[1] != held
    shuffled = {role: of_role[::-1] for role, of_role in records.items()}
    assert split_holdout(shuffled, 4, 1)[1] == held


def test_holdout_takes_a_shared_prompt_out_of_every_role():
    records = {
        "unsafe": [record("unsafe", f"q {i % 10}", f"a {i}") for i in range(20)],
        "pair": [record("pair", f"q {i}") for i in range(10)],
    }
    training, held = split_holdout(records, 3, 5)
    out = {r.messages[0].content for of_role in held.values() for r in of_role}
    assert not out & {r.messages[0].content for of_role in training.values() for r in of_role}
    assert 0 < len(training["pair"]) <= 7


def test_holdout_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"validation\.holdout=20 leaves no `safe` record to train on \(there are 20\)"):
        split_holdout(make_records(20), 20, 1)


def test_holdout_allows_an_empty_role():
    training, held = split_holdout({"safe": [record("safe", f"q {i}") for i in range(5)], "retain": []}, 2, 1)
    assert (len(training["safe"]), held["retain"], training["retain"]) == (3, [], [])
