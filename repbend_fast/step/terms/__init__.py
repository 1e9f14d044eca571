"""One file per kind of term: how it is computed, behind what ``objectives/terms`` declares."""

from repbend_fast.step.terms import answer_loss, boundary, distance, head_kl, lowered_label, pairwise, triplets
from repbend_fast.step.terms.execution import (
    EXECUTIONS,
    Execution,
    FirstPass,
    Place,
    by_layer,
    executes,
    execution_of,
    visiting,
)

__all__ = [
    "EXECUTIONS",
    "Execution",
    "FirstPass",
    "Place",
    "answer_loss",
    "boundary",
    "by_layer",
    "distance",
    "executes",
    "execution_of",
    "head_kl",
    "lowered_label",
    "pairwise",
    "triplets",
    "visiting",
]
