"""Streams of an objective of the user's own that cannot run end in one line, not in a traceback."""

from __future__ import annotations

from dataclasses import replace

import pytest

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.errors import UserError
from repbend_fast.objectives.custom import Checked
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Distance, HeadKL

SEQUENCES = (Sequence((1, 2, 3), 1), Sequence((4, 5), 1))
TERM = Distance("near", (1, 2), ((0, 3), (1, 2)), 1.0, 4.0)
GOOD = Stream("s", SEQUENCES, (TERM,))


class Own:
    roles = ("safe",)
    uses_head = False
    last_state = 2

    def __init__(self, made):
        self.made = made

    def streams(self, batch, step):
        return (stream for stream in (self.made() if callable(self.made) else self.made))

    def probes(self, batch):
        return list(self.made)


def _with(**changed):
    return lambda: [replace(GOOD, terms=(replace(TERM, **changed),))]


def test_good_streams_pass_and_a_generator_becomes_a_list() -> None:
    checked = Checked(Own([GOOD]), "mine:Own", 3)
    assert checked.streams(Batch(), 0) == [GOOD]
    assert checked.last_state == 2


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ([], "nothing to train on"),
        ([Stream("s", ())], "no sequences"),
        ([Stream("s", SEQUENCES)], "no term"),
        ([replace(GOOD, terms=(TERM, HeadKL("kl", TERM.spans, 1.0, 4.0, 1.0)))], "uses_head is false"),
        (_with(layers=(0,)), "hidden states 0"),
        (_with(layers=(1, 9)), "hidden states 9"),
        (_with(layers=(-1,)), "hidden states -1"),
        (_with(spans=((0, 3),)), "1 spans for 2 sequences"),
        (_with(spans=((0, 3), (0, 9))), r"span \(0, 9\) in a sequence of 2 tokens"),
        (_with(denominator=0), "denominator 0"),
        (_with(kind="l1"), "kind 'l1'"),
        (_with(kind="mse", limit=2.0), "only kind 'l2'"),
    ],
)
def test_what_cannot_run_is_named(made, why) -> None:
    with pytest.raises(UserError, match=rf"objective\.name=mine:Own: .*{why}"):
        Checked(Own(made), "mine:Own", 3).streams(Batch(), 0)
