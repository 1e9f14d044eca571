"""The refusal term: its draws, its rows, and loss and gradient of whole objectives that have it against their plain
expressions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import objective_oracles as oracles
import pytest
import torch
from eager_oracle import eager_terms
from kernel_compare import assert_matches, relative_l2
from objective_runs import BATCH, BLOCKS, STEP, plain_terms, precise_model, run_objective
from tiny_models import LAYOUTS, WITHOUT_DROPOUT, adapted_model, flat, gradients, pair

from repbend_fast.data.records import Batch, PairSequence, Role, Sequence
from repbend_fast.objectives import build_objective, roles_of
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.refusal import recovering, recovery_starts
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.sections import RefusalConfig

TOLERANCE = 1e-8
WINDOW: dict[str, Any] = {"window_start": 2, "window_size": 2}
ON: dict[str, Any] = {"refusal": 30.0, "recovery_tokens": 4}
DRAWN = [7, 0, 0, 0, 0, 13, 15, 14]
ALONE = dict.fromkeys(("safe", "unsafe", "cosine", "kl"), 0.0)
CASES: dict[str, RefusalConfig] = {
    "repbend": RepBendConfig(**WINDOW, **ON, pair=0.4),
    "repbend alone": RepBendConfig(**WINDOW, **ON, **ALONE),
    "repbend without bending": RepBendConfig(**WINDOW, **ON, unsafe=0.0, cosine=0.0),
    "repbend without starts": RepBendConfig(**WINDOW, refusal=30.0, recovery_tokens=0),
    "repbend, starts for all": RepBendConfig(**WINDOW, **ON, recovery_share=1.0),
    "circuit_breaker": CircuitBreakerConfig(layers=[2, 3], **ON),
    "crl": CRLConfig(**WINDOW, **ON),
    "crl alone": CRLConfig(**WINDOW, **ON, safe=0.0, unsafe=0.0, kl=0.0),
}


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def many(count: int, unsafe: int = 12) -> tuple[PairSequence, ...]:
    return tuple(pair(4, unsafe, 6, seed) for seed in range(count))


def starts(config: RefusalConfig, pairs: tuple[PairSequence, ...], step: int, seed: int = 0) -> list[int]:
    return recovery_starts(config, pairs, step, seed)


def expected_terms(model: Any, config: RefusalConfig) -> dict[str, torch.Tensor]:
    """The weighted terms, the refusal with the starts that the step draws."""
    if isinstance(config, RepBendConfig):
        weights = {
            "safe": config.safe,
            "unsafe": -config.unsafe,
            "cosine": config.cosine,
            "kl": config.kl,
            "pair": config.pair,
        }
        plain = eager_terms(model, BATCH, config)
        terms = {name: weights[name] * value for name, value in plain.items() if weights[name]}
    else:
        bends = isinstance(config, CircuitBreakerConfig) or config.safe or config.unsafe
        terms = plain_terms(model, config) if bends else {}
    terms["refusal"] = config.refusal * oracles.refusal(model, BATCH.pairs, starts(config, BATCH.pairs, STEP))
    return terms


@pytest.mark.parametrize("pieces", [None, 16], ids=["one piece", "split"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_terms_and_gradient_equal_the_plain_expression(precise, config, pieces) -> None:
    precise.zero_grad(set_to_none=True)
    terms = expected_terms(precise, config)
    torch.stack(list(terms.values())).sum().backward()
    expected = gradients(precise)
    results, got = run_objective(precise, config, piece_tokens=pieces)
    found = {name: value for result in results for name, value in result.terms.items()}
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    assert found.keys() == terms.keys()
    for name, value in terms.items():
        assert_matches(found[name] * weights[name], value.detach(), tolerance=TOLERANCE, name=name)
    assert_matches(flat(got), flat(expected), tolerance=TOLERANCE, name="gradient")
    for wrong in (torch.zeros_like(flat(got)), -flat(got), flat({n: g.roll(1, dims=0) for n, g in got.items()})):
        assert relative_l2(wrong, flat(expected)) > 0.1


def test_the_cases_have_starts_and_their_gradient_depends_on_them(precise) -> None:
    """Otherwise a term that ignored them would pass above."""
    config = CASES["repbend alone"]
    drawn = starts(config, BATCH.pairs, STEP)
    assert sorted(map(bool, drawn)) == [False, True]
    _, got = run_objective(precise, config)
    for other in ([0, 0], [k + 1 for k in drawn]):
        precise.zero_grad(set_to_none=True)
        (config.refusal * oracles.refusal(precise, BATCH.pairs, other)).backward()
        assert relative_l2(flat(gradients(precise)), flat(got)) > 0.01


@pytest.mark.parametrize("packing", LAYOUTS)
def test_levers_change_nothing(packing) -> None:
    """With LoRA dropout on: packed as padded, pieces and recomputation give the gradient of one padded piece."""
    config = CASES["circuit_breaker"]
    model = precise_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3}))
    _, expected = run_objective(model, config, dropout_seed=5)
    for pieces, checkpointed in ((None, 0), (1, 0), (24, 2), (40, BLOCKS)):
        _, got = run_objective(
            model, config, packing=packing, piece_tokens=pieces, checkpoint_blocks=checkpointed, dropout_seed=5
        )
        assert_matches(flat(got), flat(expected), tolerance=TOLERANCE)


def test_further_pairs_are_refused_and_not_bent() -> None:
    """A batch with one of its pairs in ``refused`` learns both refusals, and bends what the other one has."""
    config = CASES["repbend, starts for all"]
    first, second = BATCH.pairs
    method = build_objective(config, 32)
    whole, apart = (
        {stream.name: stream for stream in method.streams(batch, 0)}
        for batch in (BATCH, replace(BATCH, pairs=(first,), refused=(second,)))
    )
    assert apart["refusal"] == whole["refusal"]
    assert second.unsafe in whole["unsafe"].sequences
    for name in ("safe", "unsafe", "retain"):
        assert not {second.safe, second.unsafe} & set(apart[name].sequences)


def test_rows_are_those_that_predict_the_safe_answer() -> None:
    config = CASES["repbend, starts for all"]
    drawn = starts(config, BATCH.pairs, 0)
    stream = build_objective(config, 32).streams(BATCH, 0)[-1]
    assert stream.name == "refusal"
    assert (stream.stop(32), stream.reference_stop(32)) == (32, 0)
    rows = 0
    for sequence, (start, stop), k, both in zip(
        stream.sequences, stream.term("refusal").spans, drawn, BATCH.pairs, strict=True
    ):
        prompt = both.safe.prompt_length
        assert sequence.ids == (*both.unsafe.ids[: prompt + k], *both.safe.ids[prompt:])
        assert k > 0
        assert sequence.ids[start + 1 : stop + 1] == both.safe.ids[prompt:]
        rows += stop - start
    assert stream.term("refusal").denominator == rows == sum(len(p.safe) - p.safe.prompt_length for p in BATCH.pairs)


def test_a_separator_stands_behind_starts_alone_and_is_learned() -> None:
    """Of a start that ends with some of it the rest follows: one line break, then the other."""
    both = PairSequence(Sequence((1, 2, 30, 8, 8, 31, 8, 32), 2), Sequence((1, 2, 40, 41), 2), (8, 8))
    expected = {
        0: ((1, 2), (40, 41)),
        1: ((1, 2, 30), (8, 8, 40, 41)),
        2: ((1, 2, 30, 8), (8, 40, 41)),
        3: ((1, 2, 30, 8, 8), (40, 41)),
        4: ((1, 2, 30, 8, 8, 31), (8, 8, 40, 41)),
        5: ((1, 2, 30, 8, 8, 31, 8), (8, 40, 41)),
    }
    for start, (head, answer) in expected.items():
        assert recovering(both, start) == Sequence((*head, *answer), len(head))
    config = CASES["repbend, starts for all"]
    parted = tuple(replace(pair, separator=(8, 9)) for pair in BATCH.pairs)
    stream = build_objective(config, 32).streams(replace(BATCH, pairs=parted), 0)[-1]
    assert stream.term("refusal").denominator == sum(len(p.safe) - p.safe.prompt_length + 2 for p in parted)
    assert [s.ids[s.prompt_length : s.prompt_length + 2] for s in stream.sequences] == [(8, 9)] * len(parted)


def test_a_start_that_ends_as_the_safe_answer_begins_is_gone_on_with() -> None:
    """Whether the answer begins so, or a paragraph behind a separator does: nothing is said twice, nor left unsaid."""
    unsafe, safe = (40, 41, 30, 8, 8, 40, 31, 40, 41), (40, 41, 42)
    both = PairSequence(Sequence((1, 2, *unsafe), 2), Sequence((1, 2, *safe), 2), (8, 8))
    rest = {
        1: (41, 42), 2: (42,), 3: (8, 8, *safe), 4: (8, *safe), 5: safe, 6: (41, 42), 7: (8, 8, *safe), 8: (41, 42),
        9: (42,),
    }  # fmt: skip
    for start, answer in rest.items():
        assert recovering(both, start) == Sequence((1, 2, *unsafe[:start], *answer), 2 + start)
    # The safe answer's last token is always there to be learned.
    whole = PairSequence(Sequence((1, 2, 40, 41, 42, 43), 2), Sequence((1, 2, 40, 41, 42), 2))
    assert recovering(whole, 3) == Sequence((1, 2, 40, 41, 42, 40, 41, 42), 5)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("examples", [1, 2, 3, 4])
def test_the_share_holds_on_average_and_nearly_in_every_micro_batch(examples, share) -> None:
    config = RepBendConfig(refusal=1.0, recovery_share=share)
    chosen = [sum(map(bool, starts(config, many(examples), step))) for step in range(2000)]
    assert max(abs(n - share * examples) for n in chosen) < 1
    # Of a share that is drawn the standard error is below 0.5 / √2000.
    assert sum(chosen) / len(chosen) == pytest.approx(share * examples, abs=0.05)


def test_each_pair_is_chosen_as_often_and_each_length_too() -> None:
    config, pairs = RepBendConfig(refusal=1.0, recovery_tokens=5), many(2)
    drawn = [starts(config, pairs, step) for step in range(2000)]
    for place in range(2):
        counts = Counter(k[place] for k in drawn)
        assert set(counts) == set(range(6))
        assert counts[0] == pytest.approx(1000, abs=110)
        assert all(counts[k] == pytest.approx(200, abs=70) for k in range(1, 6))


def test_no_start_is_a_whole_unsafe_answer() -> None:
    config = RepBendConfig(refusal=1.0, recovery_share=1.0)
    for tokens, reached in ((1, {0}), (2, {1}), (3, {1, 2}), (40, set(range(1, 17)))):
        assert {starts(config, many(1, tokens), step)[0] for step in range(400)} == reached
    empty = PairSequence(Sequence((1, 2), 2), Sequence((1, 2, 3), 2))
    assert starts(config, (empty,), 0) == [0]


def test_draws_are_a_function_of_seed_step_and_pairs() -> None:
    config, pairs = RepBendConfig(refusal=1.0, recovery_share=1.0), many(6, 40)
    drawn = starts(config, pairs, 3)
    torch.manual_seed(99)
    assert starts(config, pairs, 3) == drawn
    assert starts(config, pairs, 4) != drawn
    assert starts(config, pairs, 3, seed=1) != drawn
    # Of a chosen pair k does not depend on what else is in the micro-batch, nor does the choice on the order.
    assert [starts(config, (p,), 3)[0] for p in pairs] == drawn
    half = config.model_copy(update={"recovery_share": 0.5})
    assert starts(half, pairs[::-1], 3)[::-1] == starts(half, pairs, 3)
    assert all(k in (0, whole) for k, whole in zip(starts(half, pairs, 3), drawn, strict=True))


def test_draws_are_the_same_in_every_process() -> None:
    """As they were when this was written: neither Python's hash seed nor a version of it decides them."""
    assert starts(RepBendConfig(refusal=1.0), many(8, 40), 3) == DRAWN


def test_a_plan_counts_with_the_longest_starts() -> None:
    for step in range(3):
        config = RepBendConfig(refusal=1.0, recovery_tokens=7)
        assert recovery_starts(config, (*many(2), *many(1, 4)), step, None) == [7, 7, 3]
    assert recovery_starts(RepBendConfig(recovery_share=0.0), many(1), 0, None) == [0]
    assert recovery_starts(RepBendConfig(recovery_tokens=0), many(1), 0, None) == [0]


@pytest.mark.parametrize(
    ("config", "roles", "needs_pairs"),
    [
        (RepBendConfig(**ALONE, refusal=1.0), {"pair"}, True),
        (RepBendConfig(safe=0.0, unsafe=0.0, cosine=0.0, refusal=1.0), {"pair", "retain"}, True),
        (RepBendConfig(), {"safe", "unsafe", "pair", "retain"}, False),
        (CircuitBreakerConfig(refusal=1.0), {"unsafe", "pair", "retain"}, True),
        (CircuitBreakerConfig(), {"unsafe", "pair", "retain"}, False),
        (CRLConfig(safe=0.0, unsafe=0.0, refusal=1.0), {"pair", "retain"}, True),
        (CRLConfig(), {"safe", "unsafe", "pair", "retain"}, False),
    ],
)
def test_roles_and_head(config, roles, needs_pairs) -> None:
    objective = build_objective(config, 32, 10)
    assert set(roles_of(config)) == roles == set(objective.roles)
    assert config.needs_pairs == needs_pairs
    assert objective.uses_head == (config.refusal > 0 or getattr(config, "kl", 0.0) > 0)
    fields: dict[str, Role] = {"safe": "safe", "unsafe": "unsafe", "pairs": "pair", "retain": "retain"}
    needed = Batch(**{field: getattr(BATCH, field) for field, role in fields.items() if role in roles})
    streams = objective.streams(needed, 0)
    assert [s.sequences for s in streams] == [s.sequences for s in objective.streams(BATCH, 0) if s.sequences]
    assert all(s.sequences for s in streams)
    # What is bent is measured all the same, so that the guard has its distances.
    assert objective.probes(needed).bent.terms[0].name == ("forget" if config.name == "circuit_breaker" else "unsafe")


def test_it_has_a_gradient_at_the_start(precise) -> None:
    """Unlike the distances, which are zero at B = 0."""
    model = adapted_model(trained=False)
    for name in ("repbend alone", "circuit_breaker", "crl alone"):
        assert float(flat(run_objective(model, CASES[name])[1]).norm()) > 1e-3
