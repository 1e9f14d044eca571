"""A stream is looked at when it is made: what would be lost silently, or fail far away, is one line there."""

from __future__ import annotations

import pytest

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.errors import UserError
from repbend_fast.objectives import (
    AnswerLoss,
    Direction,
    Distance,
    HeadKL,
    PairwiseCosine,
    Probes,
    Stream,
    Term,
    Triplet,
    Triplets,
)
from repbend_fast.objectives.custom import Checked
from repbend_fast.objectives.normalize import over_step

SEQUENCES = (Sequence((1, 2, 3), 1), Sequence((4, 5), 1))
SPANS = ((0, 3), (1, 2))
NEAR = Distance("near", (1, 2), SPANS, 1.0, 4.0)
HALF = Triplet("safe", (1, 2), ((0, 3), (0, 0)), 1.0, 3.0, 2.0)
OTHER = Triplet("unsafe", (2,), ((0, 0), (0, 2)), 0.5, 2.0, 3.0)


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ((NEAR, HeadKL("near", SPANS, 1.0, 4.0, 1.0)), "stream s: two of its terms are named near"),
        ((Distance("safe", (1,), SPANS, 1.0, 4.0), Triplets(HALF, OTHER)), "two of its terms are named safe"),
        ((Triplets(HALF, Triplet("safe", (2,), SPANS, 1.0, 2.0, 3.0)),), "two of its terms are named safe"),
        ((Distance("near", (1,), SPANS[:1], 1.0, 4.0),), "term near has 1 spans for 2 sequences"),
        ((HeadKL("kl", ((0, 3), (0, 3)), 1.0, 4.0, 1.0),), r"term kl has the span \(0, 3\) in a sequence of 2 tokens"),
        ((AnswerLoss("nll", ((2, 1), (0, 1)), 1.0, 4.0),), r"term nll has the span \(2, 1\)"),
        ((AnswerLoss("nll", ((0, 2, 1, 2), (0, 1)), 1.0, 4.0),), r"the span \(0, 2, 1, 2\) in a sequence of 3"),
        ((AnswerLoss("nll", ((0, 1, 2), (0, 1)), 1.0, 4.0),), r"term nll has the span \(0, 1, 2\)"),
        (
            (Triplets(HALF, Triplet("unsafe", (2,), ((0, 0), (0, 9)), 1.0, 2.0, 3.0)),),
            r"term unsafe has the span \(0, 9\)",
        ),
        (
            (PairwiseCosine("cosine", (1,), (0, 2), 1.0),),
            r"term cosine has the span \(2, 3\) in a sequence of 2 tokens",
        ),
        ((PairwiseCosine("cosine", (1,), (0,), 1.0),), "term cosine has 1 spans for 2 sequences"),
        (
            (Distance("near", (1,), SPANS, 1.0, 4.0, kind="l1"),),
            "term near is of kind 'l1'; there are l2, cosine, relu_cosine, mse",
        ),
        (
            (Distance("near", (1,), SPANS, 1.0, 4.0, kind="mse", limit=2.0),),
            "has a limit, which only kind 'l2' can have",
        ),
        (
            (Distance("near", (1,), SPANS, 1.0, 4.0, against=(None,)),),
            "has 1 sequences to compare with for 2 sequences",
        ),
    ],
)
def test_what_does_not_fit_is_named(terms: tuple[Term, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Stream("s", SEQUENCES, terms)


def test_what_a_stream_asks_its_terms() -> None:
    stream = Stream(
        "s", SEQUENCES, (NEAR, PairwiseCosine("cosine", (2, 3), (0, 0), 0.5), HeadKL("kl", SPANS, 0.0, 4.0, 1.0))
    )
    assert stream.layers == (1, 2, 3)
    assert stream.weights == {"near": 1.0, "cosine": 0.5}
    assert (stream.stop(9), stream.reference_stop(9)) == (9, 9)
    assert (stream.head_rows(), stream.head_rows((1,))) == (4, 1)
    assert stream.weighed("kl", 2.0).weights == {"near": 1.0, "cosine": 0.5, "kl": 2.0}
    assert stream.weighed("nobody", 2.0) is stream
    bent = Stream("s", SEQUENCES, (Distance("push", (4,), SPANS, 1.0, 4.0, target=Direction(1, 2.0)), NEAR))
    assert (bent.reads_head, bent.stop(9), bent.reference_stop(9)) == (False, 4, 2)


def test_the_step_s_denominators_keep_what_triplets_count_in() -> None:
    """The unit was lost, so that with ``training.normalize=step`` the triplets' lengths counted in the states' own."""
    stream = Stream("triplet", SEQUENCES, (Triplets(HALF, OTHER, unit="reference"),))
    ((found,), _) = over_step([[stream], [stream]])
    assert found.terms[0].unit == "reference"
    assert found.terms[0].unit_power == 1
    assert found == stream


class Listed:
    roles = ("safe",)
    uses_head = False

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        return [Stream("s", SEQUENCES, (NEAR, NEAR))]

    def probes(self, batch: Batch) -> list[Stream]:
        return [Stream("s", SEQUENCES, (NEAR,))]


def test_an_objective_of_one_s_own_is_named_with_its_method() -> None:
    own = Checked(Listed(), "mine:Listed", 3)
    with pytest.raises(
        UserError, match=r"^objective\.name=mine:Listed: streams: stream s: two of its terms are named near"
    ):
        own.streams(Batch(), 0)
    with pytest.raises(
        UserError, match=r"^objective\.name=mine:Listed: probes gives a list; it must give Probes\(bent, kept\)"
    ):
        own.probes(Batch())


def test_probes_say_which_is_which() -> None:
    stream = Stream("held", SEQUENCES, (NEAR,))
    assert list(Probes(kept=stream)) == [stream]
    assert list(Probes(bent=stream, kept=stream)) == [stream, stream]
    assert list(Probes()) == []
