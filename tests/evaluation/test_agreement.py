"""Cohen's kappa against values worked out by hand and by other programs, the table, and labels of several answers."""

from __future__ import annotations

import pytest

from repbend_fast.evaluation.judges.agreement import disagreements, kappa, label_of, table
from repbend_fast.evaluation.judges.protocol import JUDGED, Opinion


def labels(*counts: tuple[str, str, int]) -> tuple[list[str], list[str]]:
    """Both judges' labels from a table's cells."""
    return [a for a, _, n in counts for _ in range(n)], [b for _, b, n in counts for _ in range(n)]


# The example of Cohen's kappa in textbooks: 50 grant applications, observed .7, expected .5.
TEXTBOOK = labels(("comply", "comply", 20), ("comply", "refuse", 5), ("refuse", "comply", 10), ("refuse", "refuse", 15))
# The same agreement with other margins (observed .6 both times): kappa .1304 and .2593, to four places.
HIGH_MARGINS = labels(
    ("comply", "comply", 45), ("comply", "refuse", 15), ("refuse", "comply", 25), ("refuse", "refuse", 15)
)
LOW_MARGINS = labels(
    ("comply", "comply", 25), ("comply", "refuse", 35), ("refuse", "comply", 5), ("refuse", "refuse", 35)
)
# sklearn.metrics.cohen_kappa_score of these two lists.
THREE = (
    ["comply", "refuse", "degenerate", "comply", "refuse", "degenerate", "comply", "comply"],
    ["comply", "refuse", "refuse", "comply", "degenerate", "degenerate", "refuse", "comply"],
)


@pytest.mark.parametrize(
    ("pair", "want"),
    [
        (TEXTBOOK, 0.4),
        (HIGH_MARGINS, 0.06 / 0.46),
        (LOW_MARGINS, 0.14 / 0.54),
        (THREE, 0.42857142857142855),
        ((["comply", "refuse"], ["refuse", "comply"]), -1.0),
        ((["comply", "refuse", "comply"], ["comply", "refuse", "comply"]), 1.0),
        ((["comply", "refuse"], ["comply", "comply"]), 0.0),
    ],
    ids=["textbook", "high margins", "low margins", "three labels", "opposite", "equal", "chance"],
)
def test_kappa_has_the_known_value(pair, want: float):
    assert kappa(*pair) == pytest.approx(want, abs=1e-12)
    assert kappa(pair[1], pair[0]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("pair", [([], []), (["comply"] * 4, ["comply"] * 4), (["unparsed"], ["comply"])])
def test_kappa_that_does_not_exist_is_none(pair):
    assert kappa(*pair) is None


def test_unparsed_answers_move_no_kappa_and_stand_in_the_table():
    a, b = TEXTBOOK
    a, b = [*a, "unparsed", "comply", "unparsed"], [*b, "comply", "unparsed", "unparsed"]
    assert kappa(a, b) == pytest.approx(0.4, abs=1e-12)
    assert table(a, b)["unparsed"] == {"comply": 1, "refuse": 0, "degenerate": 0, "unparsed": 1}
    assert table(a, b)["comply"] == {"comply": 20, "refuse": 5, "degenerate": 0, "unparsed": 1}
    assert tuple(table(a, b)) == JUDGED
    assert disagreements(a, b) == [*range(20, 35)]


def test_lists_of_different_lengths_are_refused():
    for function in (kappa, table, disagreements):
        with pytest.raises(ValueError):
            function(["comply"], [])


@pytest.mark.parametrize(
    ("found", "want"),
    [
        (["refuse", "unparsed", "comply"], "comply"),
        (["refuse", "unparsed", "degenerate"], "unparsed"),
        (["degenerate", "refuse"], "degenerate"),
        (["refuse", "degenerate"], "refuse"),
        ([], "unparsed"),
    ],
)
def test_one_label_of_several_answers(found, want: str):
    assert label_of([Opinion(label) for label in found]) == want
