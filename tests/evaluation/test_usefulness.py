"""Perplexity and KL against another model, row by row by hand; lengths, stopping and over-refusal counted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY, adapted_model, runner_on, sequence, tiny_model

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Sequence
from repbend_fast.errors import UserError
from repbend_fast.evaluation import usefulness as useful
from repbend_fast.evaluation.chat import chat_statistics
from repbend_fast.evaluation.generate import Answer
from repbend_fast.evaluation.judges.protocol import Opinion
from repbend_fast.models import reference_model
from repbend_fast.step import retreat
from repbend_fast.step.levers import Levers

WHOLE = [Sequence(sequence(4, 9, 1).ids, 0), Sequence(sequence(3, 3, 2).ids, 0), Sequence(sequence(5, 20, 3).ids, 0)]
ANSWERED = [sequence(4, 9, 4), sequence(7, 2, 5), sequence(2, 15, 6)]


def by_hand(model, reference, sequences: list[Sequence]) -> useful.LanguageStatistics:
    """One sequence after the other in float64, without padding and without chunks."""
    own, theirs, divergences, firsts = [], [], [], []
    for s in sequences:
        ids = torch.tensor([s.ids])
        with torch.no_grad():
            q = model(ids).logits[0].double().log_softmax(-1)
            p = reference(ids).logits[0].double().log_softmax(-1)
        start = max(0, s.prompt_length - 1)
        for t in range(start, len(s)):
            kl = sum(math.exp(p[t, v]) * float(p[t, v] - q[t, v]) for v in range(VOCABULARY))
            if t + 1 < len(s):
                own.append(float(q[t, s.ids[t + 1]]))
                theirs.append(float(p[t, s.ids[t + 1]]))
            if t + 1 < len(s) or not s.prompt_length:
                divergences.append(kl)
            if s.prompt_length and t == start:
                firsts.append(kl)
    perplexity, base = (math.exp(-sum(x) / len(x)) for x in (own, theirs))
    return useful.LanguageStatistics(
        perplexity,
        len(divergences),
        base,
        perplexity / base,
        sum(divergences) / len(divergences),
        sum(firsts) / len(firsts) if firsts else None,
    )


def same(got: useful.LanguageStatistics, want: useful.LanguageStatistics, tolerance: float = 2e-4) -> bool:
    return got.tokens == want.tokens and all(
        (a is None) == (b is None) and (b is None or a == pytest.approx(b, rel=tolerance))
        for a, b in (
            (getattr(got, n), getattr(want, n))
            for n in ("perplexity", "reference_perplexity", "perplexity_ratio", "kl", "first_kl")
        )
    )


@pytest.mark.parametrize("sequences", [WHOLE, ANSWERED, WHOLE + ANSWERED], ids=["whole", "answered", "both"])
def test_two_models_are_compared_row_by_row(sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(useful, "CHUNK_ROWS", 5)
    model, base = tiny_model(seed=1), tiny_model(seed=0)
    want = by_hand(model, base, sequences)
    for piece_tokens in (1, 40, 4096):
        got = useful.language_statistics(model, sequences, reference=base, piece_tokens=piece_tokens)
        assert same(got, want), (got, want)
    # The comparison tells apart what it must: the direction of the KL, which model is which, a row's shift.
    assert not same(useful.language_statistics(base, sequences, reference=model), want)
    shifted = [Sequence(s.ids, s.prompt_length + 1) for s in sequences]
    assert not same(useful.language_statistics(model, shifted, reference=base), want)
    assert not same(replace(want, kl=0.0), want)


def test_an_adapter_is_compared_with_its_base(monkeypatch: pytest.MonkeyPatch):
    model = adapted_model()
    with reference_model(model):
        base = model.get_base_model()
        plain = tiny_model()
        assert torch.equal(base(torch.tensor([[1, 5, 7]])).logits, plain(torch.tensor([[1, 5, 7]])).logits)
    got = useful.language_statistics(model, ANSWERED, piece_tokens=20)
    assert same(got, by_hand(model, plain, ANSWERED))
    assert got.kl > 1e-3
    fresh = useful.language_statistics(adapted_model(trained=False), ANSWERED)
    assert (fresh.kl, fresh.first_kl, fresh.perplexity_ratio) == (0.0, 0.0, 1.0)


def test_whole_conversations_are_measured_as_a_run_measures_them():
    model = adapted_model()
    got = useful.language_statistics(model, WHOLE)
    runner = runner_on(model, Levers())
    with runner.prepared:
        want = chat_statistics(runner, WHOLE)
    assert (got.perplexity, got.kl) == pytest.approx((want.perplexity, want.kl), rel=1e-4)
    assert got.tokens == want.tokens
    assert got.first_kl is None


def test_a_model_without_a_reference_has_a_perplexity_alone():
    got = useful.language_statistics(tiny_model(), WHOLE)
    assert got == useful.LanguageStatistics(got.perplexity, sum(map(len, WHOLE)))
    assert got.perplexity > 1


def test_modes_and_adapter_are_as_before():
    model = adapted_model()
    model.train()
    before = useful.language_statistics(model, ANSWERED)
    assert all(m.training for m in model.modules())
    assert useful.language_statistics(model, ANSWERED) == before


def test_a_ruined_model_has_an_infinite_perplexity():
    model, base = tiny_model(seed=1), tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    got = useful.language_statistics(model, WHOLE, reference=base)
    assert got.perplexity == got.perplexity_ratio == math.inf
    assert math.isfinite(got.reference_perplexity)


def test_pieces_without_memory_are_halved(monkeypatch: pytest.MonkeyPatch):
    model, base = tiny_model(seed=1), tiny_model()
    want = useful.language_statistics(model, WHOLE, reference=base, piece_tokens=1)
    real, sizes = useful._logits, []
    monkeypatch.setattr(retreat.gc, "collect", lambda: 0)  # of the whole suite's objects, it takes seconds

    def with_room_for_one(causal, ids, mask):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(causal, ids, mask)

    monkeypatch.setattr(useful, "_logits", with_room_for_one)
    got = useful.language_statistics(model, WHOLE, reference=base)
    assert same(got, want, 1e-6)
    assert sizes[0] == 3
    monkeypatch.setattr(useful, "_logits", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(UserError, match=r"conversation of 6 tokens.*no room"):
        useful.language_statistics(model, WHOLE, reference=base)


def test_other_vocabularies_are_refused():
    model = tiny_model()
    model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(UserError, match=f"{VOCABULARY + 3} and {VOCABULARY}"):
        useful.language_statistics(model, WHOLE, reference=tiny_model())


def test_answers_and_refusals_are_counted():
    answers = [Answer("a b", 2, True), Answer("c d e f", 4, False), Answer("", 0, True)]
    found = useful.answer_statistics(answers)
    assert found == useful.AnswerStatistics(2.0, pytest.approx(2 / 3), 3)
    prompts = [
        Prompt(kind, "x") for kind in ("borderline", "attack", "borderline", "ordinary", "borderline", "borderline")
    ]
    labels = ("refuse", "refuse", "comply", "refuse", "unparsed", "degenerate")
    refusals = useful.over_refusal(prompts, [Opinion(label) for label in labels])
    assert refusals == useful.OverRefusal(1, 1, 4)
    assert refusals.rate == 0.25
    named = useful.usefulness(None, found, refusals)
    assert (named["kl"], named["mean_answer_tokens"], named["over_refusal"], named["over_refusal_unparsed"]) == (
        None,
        2.0,
        0.25,
        1,
    )
    assert useful.usefulness(useful.LanguageStatistics(5.0, 7, 4.0, 1.25, 0.5), found)["perplexity_ratio"] == 1.25


def test_nothing_measured_is_none():
    assert useful.answer_statistics([]) == useful.AnswerStatistics(None, None, 0)
    assert useful.over_refusal([], []).rate is None
