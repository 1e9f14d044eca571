"""RepBend's streams: which sequences, rows, layers, weights and denominators, from a batch whose lengths
are all known.
"""

from __future__ import annotations

import pytest
from tiny_models import objective_config, ragged_batch

from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.objectives import OBJECTIVES, Stream, build_objective, roles_of
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.rows import select_rows
from repbend_fast.objectives.terms import Distance

BATCH = ragged_batch()
BLOCKS = 6
# (prompt, answer) of safe + safe answers of the pairs, and of unsafe + unsafe answers of the pairs
SAFE = [(5, 4), (7, 3), (6, 8), (3, 2)]
UNSAFE = [(4, 7), (9, 5), (6, 5), (3, 6)]
RETAIN = [12, 6]


def _streams(batch: Batch = BATCH, **settings) -> dict[str, Stream]:
    objective = build_objective(objective_config(**settings), BLOCKS)
    return {stream.name: stream for stream in objective.streams(batch, 0)}


def test_published_weights_signs_and_window() -> None:
    config = RepBendConfig()
    assert config.window == tuple(range(20, 31))
    streams = {s.name: s for s in build_objective(config, 32).streams(BATCH, 0)}
    assert {n: w for s in streams.values() for n, w in s.weights.items()} == {
        "safe": 0.5,
        "unsafe": -0.5,
        "cosine": 0.1,
        "kl": 0.3,
    }
    assert [s.stop(32) for s in streams.values()] == [32, 30, 32]
    assert streams["unsafe"].layers == config.window
    assert streams["retain"].layers == ()
    assert list(OBJECTIVES) == [
        "repbend",
        "circuit_breaker",
        "rmu",
        "npo",
        "crl",
        "simnpo",
        "wga",
        "sat_imp",
        "x_boundary",
        "undial",
        "ce_u",
        "lat",
    ]


def test_response_rows() -> None:
    streams = _streams()
    assert streams["safe"].sequences == (*BATCH.safe, *(p.safe for p in BATCH.pairs))
    assert streams["unsafe"].sequences == (*BATCH.unsafe, *(p.unsafe for p in BATCH.pairs))
    assert streams["retain"].sequences == BATCH.retain
    for name, lengths in (("safe", SAFE), ("unsafe", UNSAFE)):
        (term,) = (t for t in streams[name].terms if isinstance(t, Distance))
        assert term.spans == tuple((p, p + a) for p, a in lengths)
        assert term.kind == "l2"
        assert term.against is None


@pytest.mark.parametrize(
    ("mode", "span"),
    [
        ("prompt_last", lambda p, a: (p - 1, p)),
        ("prompt_all", lambda p, a: (0, p)),
        ("prompt_response", lambda p, a: (0, p + a)),
        ("response_all", lambda p, a: (p, p + a)),
    ],
)
@pytest.mark.parametrize("alpha_mode", ["all", "target"])
def test_rows_layers_and_denominators(mode, span, alpha_mode) -> None:
    streams = _streams(loss_mode=mode, alpha_mode=alpha_mode)
    prompts_only = mode in ("prompt_last", "prompt_all")
    safe, unsafe = streams["safe"].terms[0], streams["unsafe"].terms[0]
    used = SAFE[:2] if prompts_only else SAFE
    assert safe.spans == tuple(span(p, a) for p, a in used)
    assert unsafe.spans == tuple(span(p, a) for p, a in UNSAFE)
    assert safe.layers == ((1, 2, 3, 4, 5, 6) if alpha_mode == "all" else (2, 3))
    assert unsafe.layers == (2, 3)
    rows = sum(b - a for a, b in safe.spans)
    assert safe.denominator == rows * (7 if alpha_mode == "all" else 2)
    assert unsafe.denominator == 2 * sum(b - a for a, b in unsafe.spans)
    for name, lengths in (("safe", used), ("unsafe", UNSAFE)):
        expected = [p if prompts_only else p + a for p, a in lengths]
        assert [len(s) for s in streams[name].sequences] == expected
    assert streams["unsafe"].term("cosine").positions == (3, 8, 5, 2)
    assert streams["unsafe"].term("cosine").layers == (2, 3)


@pytest.mark.parametrize("mode", ["prompt_last", "prompt_all", "prompt_response", "response_all"])
@pytest.mark.parametrize("alias", [False, True], ids=["ours", "published"])
def test_published_quirk_touches_prompt_last_alone(mode, alias) -> None:
    name = mode.replace("prompt_", "request_") if alias else mode
    quirky = _streams(loss_mode=name, published_quirks=True)["unsafe"]
    plain = _streams(loss_mode=name)["unsafe"]
    if mode != "prompt_last":
        assert quirky == plain
        return
    assert plain.terms[0].spans == ((3, 4), (8, 9), (5, 6), (2, 3))
    assert plain.terms[0].denominator == 4 * 2
    assert quirky.terms[0].spans == ((3, 4), (8, 9), (0, 0), (0, 0))
    assert quirky.terms[0].denominator == 2 * 2
    assert quirky.term("cosine") == plain.term("cosine")
    assert quirky.sequences == plain.sequences


def test_kl_reduction() -> None:
    by_sequence, by_token = _streams()["retain"].term("kl"), _streams(kl_reduction="token")["retain"].term("kl")
    assert by_sequence.spans == by_token.spans == tuple((0, n) for n in RETAIN)
    assert (by_sequence.denominator, by_token.denominator) == (2, 18)
    assert by_sequence.temperature == 2.0
    assert _streams(temperature=1.5)["retain"].term("kl").temperature == 1.5


@pytest.mark.parametrize(
    ("dropped", "terms", "roles"),
    [
        ({"safe": 0}, {"unsafe", "cosine", "kl"}, ("unsafe", "pair", "retain")),
        ({"unsafe": 0}, {"safe", "cosine", "kl"}, ("safe", "pair", "unsafe", "retain")),
        ({"cosine": 0}, {"safe", "unsafe", "kl"}, ("safe", "pair", "unsafe", "retain")),
        ({"kl": 0}, {"safe", "unsafe", "cosine"}, ("safe", "pair", "unsafe")),
        ({"unsafe": 0, "cosine": 0}, {"safe", "kl"}, ("safe", "pair", "retain")),
        ({"unsafe": 0, "cosine": 0, "loss_mode": "prompt_all"}, {"safe", "kl"}, ("safe", "retain")),
        ({"safe": 0, "kl": 0, "unsafe": 0, "cosine": 0, "pair": 0.4}, {"pair"}, ("unsafe", "pair")),
    ],
)
def test_a_weight_of_zero_drops_the_term(dropped, terms, roles) -> None:
    weights = {"safe": 0.5, "unsafe": 0.5, "cosine": 0.1, "kl": 0.3} | dropped
    config = objective_config(**{k: float(v) if isinstance(v, int) else v for k, v in weights.items()})
    streams = build_objective(config, BLOCKS).streams(BATCH, 0)
    assert {name for s in streams for name in s.weights} == terms
    assert sorted(roles_of(config)) == sorted(roles)
    assert build_objective(config, BLOCKS).uses_head == ("kl" in terms)
    needed = Batch(
        **{
            field: getattr(BATCH, field)
            for field in ("safe", "unsafe", "pairs", "retain")
            if field.rstrip("s") in roles or field in roles
        }
    )
    assert build_objective(config, BLOCKS).streams(needed, 0) == streams


@pytest.mark.parametrize("unweighted", ["safe", "unsafe"])
def test_the_guard_sees_what_moves_without_a_weight_of_its_own(unweighted: str) -> None:
    def probes(**settings) -> list[Stream]:
        return list(build_objective(objective_config(pair=1.0, **settings), BLOCKS).probes(BATCH))

    weighted, found = probes(), probes(**{unweighted: 0.0})
    assert [s.terms[0].name for s in found] == ["unsafe", "safe"]
    assert [(s.sequences, s.terms[0].layers, s.terms[0].spans) for s in found] == [
        (s.sequences, s.terms[0].layers, s.terms[0].spans) for s in weighted
    ]


def test_pair_term() -> None:
    streams = _streams(pair=0.4)
    term = streams["unsafe"].terms[1]
    assert (term.name, term.weight) == ("pair", 0.4)
    # last prompt token on, cut to the shorter answer: prompts 6 and 3; answers 5 against 8, and 6 against 2
    assert term.spans == ((0, 0), (0, 0), (5, 11), (2, 5))
    assert term.against == (None, None, BATCH.pairs[0].safe, BATCH.pairs[1].safe)
    assert term.denominator == (6 + 3) * 2
    term = _streams(pair=0.4, pair_positions=4)["unsafe"].terms[1]
    assert term.spans == ((0, 0), (0, 0), (5, 9), (2, 5))
    assert term.denominator == (4 + 3) * 2


@pytest.mark.parametrize("mode", ["prompt_last", "prompt_all"])
def test_pair_term_keeps_the_answers_that_it_reads(mode) -> None:
    plain, paired = _streams(loss_mode=mode)["unsafe"], _streams(loss_mode=mode, pair=0.4)["unsafe"]
    assert paired.terms[0] == plain.terms[0]
    for span, sequence in zip(paired.terms[1].spans, paired.sequences):
        assert span[1] <= len(sequence)


def test_a_window_that_starts_at_the_embeddings() -> None:
    streams = _streams(window_start=0, window_size=3, alpha_mode="target", pair=0.4)
    unsafe, pair = streams["unsafe"].terms[:2]
    for term in (streams["safe"].terms[0], unsafe):
        assert term.layers == (1, 2)
        assert term.denominator == 3 * sum(b - a for a, b in term.spans)
    assert pair.layers == (0, 1, 2)
    assert streams["unsafe"].term("cosine").layers == (0, 1, 2)


def test_one_unsafe_sequence_has_no_pairs_to_compare() -> None:
    one = Batch(unsafe=BATCH.unsafe[:1])
    streams = {s.name: s for s in build_objective(objective_config(safe=0.0, kl=0.0), BLOCKS).streams(one, 0)}
    assert streams["unsafe"].term("cosine") is None
    assert build_objective(objective_config(safe=0.0, kl=0.0, unsafe=0.0), BLOCKS).streams(one, 0) == []


@pytest.mark.parametrize(("start", "size"), [(BLOCKS, 2), (BLOCKS + 1, 1), (20, 11)])
def test_a_window_beyond_the_model_is_refused(start, size) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(objective_config(window_start=start, window_size=size), BLOCKS)
    message = str(caught.value)
    assert f"objective.window_start={start}, window_size={size}" in message
    assert f"hidden states 0 … {BLOCKS}" in message
    assert str(start + size - 1) in message


def test_the_last_hidden_state_may_be_in_the_window() -> None:
    assert _streams(window_start=BLOCKS, window_size=1)["unsafe"].stop(BLOCKS) == BLOCKS


def test_rows_of_one_sequence() -> None:
    sequence = BATCH.safe[0]
    spans = [select_rows(sequence, mode) for mode in ("prompt_last", "prompt_all", "prompt_response", "response_all")]
    assert spans == [(4, 5), (0, 5), (0, 9), (5, 9)]
