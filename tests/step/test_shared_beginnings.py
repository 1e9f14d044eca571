"""Sequences that begin alike run their beginning once, and everything is as if each had run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import ALL_CONFIGS, BATCH, OTHERWISE, SEARCHING, precise_model, run_objective
from tiny_models import WITHOUT_DROPOUT, adapted_model, flat, gradients, runner_on

from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.models.layers.packing import pack
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.terms import AnswerLoss, Distance, HeadKL
from repbend_fast.step import pieces
from repbend_fast.step.levers import Levers
from repbend_fast.step.pieces import make_pieces, shared_beginning

BEGINNING = (1, 17, 5, 9, 31, 12, 7, 40, 22, 3)
TOLERANCE = 1e-9
CONFIGS = {**ALL_CONFIGS, **OTHERWISE, **SEARCHING}


def begun(sequence: Sequence) -> Sequence:
    prompt = sequence.prompt_length and sequence.prompt_length + len(BEGINNING)
    return Sequence((*BEGINNING, *sequence.ids[1:], 2), prompt)


def begun_batch(batch: Batch = BATCH) -> Batch:
    return Batch(
        safe=tuple(map(begun, batch.safe)),
        unsafe=tuple(map(begun, batch.unsafe)),
        pairs=tuple(PairSequence(begun(pair.unsafe), begun(pair.safe)) for pair in batch.pairs),
        retain=tuple(map(begun, batch.retain)),
    )


@pytest.fixture
def laid(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each batch that is laid out: tokens that it has once, and sequences."""
    found: list[tuple[int, int]] = []

    def spy(parts: Any, layout: Any, device: torch.device, shared: int = 0) -> Any:
        found.append((shared, sum(len(members) for _, members in parts)))
        return make_pieces(parts, layout, device, shared)

    monkeypatch.setattr("repbend_fast.step.runner.make_pieces", spy)
    return found


@pytest.mark.parametrize("sizes", [{}, {"piece_tokens": 40, "checkpoint_blocks": 2}], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradient_are_those_of_each_alone(name: str, sizes: dict[str, Any], laid: list[Any]) -> None:
    model, batch = precise_model(), begun_batch()
    expected, wanted = run_objective(model, CONFIGS[name], packing="on", batch=batch, **sizes)
    assert not any(shared for shared, _ in laid)
    got, gradient = run_objective(model, CONFIGS[name], packing="on", batch=batch, share_beginnings="on", **sizes)
    for one, other in zip(got, expected, strict=True):
        assert one.terms.keys() == other.terms.keys()
        for term, value in other.terms.items():
            assert_matches(one.terms[term], value, tolerance=TOLERANCE, name=term)
    assert_matches(flat(gradient), flat(wanted), tolerance=TOLERANCE, name="gradient")
    for wrong in (torch.zeros_like(flat(wanted)), -flat(wanted), flat({n: g.roll(1, 0) for n, g in wanted.items()})):
        assert relative_l2(flat(gradient), wrong) > 0.1
    if name in ("repbend", "repbend, attacked") and not sizes:
        assert (len(BEGINNING), 2) in laid  # the retain stream, whose KL reads the beginning too


def test_streams_of_one_batch_share_it(laid: list[Any]) -> None:
    """With passes of several streams together it stands once for all of them."""
    model, batch, config = precise_model(), begun_batch(), ALL_CONFIGS["repbend"]
    objective = build_objective(config, 4, 10)
    streams = objective.streams(batch, 2)
    found = []
    for share in ("off", "on"):
        model.zero_grad(set_to_none=True)
        levers = Levers(packing="on", merge_streams="on", share_beginnings=share)  # type: ignore[arg-type]
        runner_on(model, levers).backward_all(streams, dropout_seed=0)
        found.append(flat(gradients(model)))
    assert_matches(found[1], found[0], tolerance=TOLERANCE)
    assert (len(BEGINNING), 10) in laid


def test_dropout_keeps_every_sequence_whole(laid: list[Any]) -> None:
    """Masks belong to a sequence and a position."""
    model, batch = adapted_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3})), begun_batch()
    for share in ("off", "on"):
        run_objective(model, ALL_CONFIGS["repbend"], packing="on", batch=batch, share_beginnings=share, dropout_seed=3)
    assert not any(shared for shared, _ in laid)


def test_distances_are_zero_at_the_start() -> None:
    model = adapted_model(trained=False)
    results, _ = run_objective(
        model, ALL_CONFIGS["repbend"], packing="on", batch=begun_batch(), share_beginnings="on", measure=True
    )
    terms = {name: float(value) for result in results for name, value in result.terms.items()}
    assert terms["safe"] == terms["unsafe"] == terms["kl"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_hidden_states_of_every_family(family: str) -> None:
    """Sliding windows, soft-caps and other heads included: the proof at load decides, and what it lets through is
    right.
    """
    from repbend_fast.step.proof import prove_model

    runner = runner_on(adapted_model(family, torch.float64), Levers(packing="on"))
    proof = prove_model(runner.parts, "on", "auto")
    (check,) = [check for check in proof.checks if check.name == "shared beginnings = own"] or [None]
    assert (check is not None and check.holds) == proof.shares
    assert proof.shares == (family != "gemma2")  # whose soft-caps SDPA does not know


SEQUENCES = tuple(map(begun, (*BATCH.unsafe, *BATCH.retain)))


def kl(*spans: tuple[int, ...]) -> HeadKL:
    return HeadKL("kl", spans, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("terms", "length"),
    [
        ((), 10),
        ((kl((0, 13), (0, 15), (0, 20), (0, 14)),), 10),
        ((kl((0, 13), (3, 15), (0, 20), (0, 14)),), 0),
        ((kl((9, 13), (9, 15), (10, 20), (9, 14)),), 9),
        ((AnswerLoss("a", ((9, 13), (12, 15), (0, 0), (11, 12)), 1.0, 1.0),), 9),
        ((Distance("d", (1,), ((4, 13), (12, 15), (12, 13), (11, 12)), 1.0, 1.0),), 0),
    ],
)
def test_what_is_shared(terms: tuple[Any, ...], length: int) -> None:
    """As far as all begin alike, before every row that is read; a KL may read the same of the beginning of each."""
    assert shared_beginning([((SEQUENCES, (0, 1, 2, 3)), terms)]) == length


def test_what_is_not_shared() -> None:
    one = (SEQUENCES, (0,))
    assert shared_beginning([(one, ())]) == 0
    other = replace(SEQUENCES[1], ids=(1, 18, *SEQUENCES[1].ids[2:]))
    assert shared_beginning([(one, ()), (((other,), (0,)), ())]) == 0
    short = Sequence(BEGINNING[:9], 2)
    assert shared_beginning([(one, ()), (((short,), (0,)), ())]) == 8  # which goes on with one token
    triplets = build_objective(ALL_CONFIGS["crl"], 4, 10).streams(begun_batch(), 0)[0]
    assert shared_beginning([((triplets.sequences, (0, 1)), triplets.terms)]) == 0


def test_rows_of_a_piece() -> None:
    (piece,) = make_pieces([(SEQUENCES, (1, 0))], "packed", torch.device("cpu"), 10)
    row = piece.input_ids.reshape(-1)
    assert row[:10].tolist() == list(BEGINNING)
    lengths = [len(SEQUENCES[1]) - 10, len(SEQUENCES[0]) - 10]
    assert row.shape[0] == 10 + sum(lengths)
    assert piece.tokens == len(SEQUENCES[0]) + len(SEQUENCES[1])
    spans = ((8, 12), (8, 13), (0, 0), (0, 0))
    assert row[piece.rows(spans)].tolist() == [*SEQUENCES[1].ids[10:13], *SEQUENCES[0].ids[10:12]]
    assert piece.shared_rows(spans).tolist() == [8, 9]
    assert piece.packed is not None
    expected = [*range(10), *range(10, 10 + lengths[0]), *range(10, 10 + lengths[1])]
    assert piece.packed.position_ids[0].tolist() == expected
    assert pack((2, 3), torch.device("cpu"), 4).bounds.tolist() == [4, 6, 9]
    assert pieces.LEAST_SHARED <= 10
