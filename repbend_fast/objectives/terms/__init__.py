"""Terms of a loss as they are declared: ``term`` has what any kind is asked, ``state_terms`` and ``head_terms`` the
kinds.
"""

from repbend_fast.objectives.terms.head_terms import (
    AnswerLoss,
    HeadKL,
    HeadTerm,
    LoweredLabel,
    SimplePreference,
    Unlikelihood,
    WeightedAscent,
)
from repbend_fast.objectives.terms.state_terms import (
    BoundaryCosine,
    Direction,
    Distance,
    PairwiseCosine,
    Triplet,
    Triplets,
)
from repbend_fast.objectives.terms.term import DISTANCE_KINDS, KL_BOUND, Span, Term, Unit, ranges_of, rows_in

__all__ = [
    "DISTANCE_KINDS",
    "KL_BOUND",
    "AnswerLoss",
    "BoundaryCosine",
    "Direction",
    "Distance",
    "HeadKL",
    "HeadTerm",
    "LoweredLabel",
    "PairwiseCosine",
    "SimplePreference",
    "Span",
    "Term",
    "Triplet",
    "Triplets",
    "Unit",
    "Unlikelihood",
    "WeightedAscent",
    "ranges_of",
    "rows_in",
]
