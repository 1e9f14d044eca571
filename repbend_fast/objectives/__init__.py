"""Objectives: each says which streams, rows, layers, distances and weights it uses."""

from typing import Any

from repbend_fast.data.records import Role
from repbend_fast.objectives.base import (
    AnswerLoss,
    Direction,
    Distance,
    HeadKL,
    Objective,
    PairwiseCosine,
    Span,
    Stream,
    Triplet,
    Triplets,
)
from repbend_fast.objectives.circuit_breaker import CircuitBreaker
from repbend_fast.objectives.crl import CRL
from repbend_fast.objectives.custom import Checked, load_class
from repbend_fast.objectives.npo import NPO
from repbend_fast.objectives.repbend import RepBend
from repbend_fast.objectives.rmu import RMU
from repbend_fast.objectives.sections import CustomObjectiveConfig, ObjectiveSection, RefusalSection

OBJECTIVES: dict[str, Any] = {"repbend": RepBend, "circuit_breaker": CircuitBreaker, "rmu": RMU, "npo": NPO, "crl": CRL}


def build_objective(config: ObjectiveSection, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> Objective:
    """The objective that ``config.name`` names.

    Args:
        num_blocks: decoder blocks of the model; its hidden states are 0 … ``num_blocks``.
        steps: optimizer steps of the run, for weights that follow a schedule.
        seed: of the run, for recovery starts; None = the longest ones (``objectives.refusal``).

    Raises:
        UserError: a layer that the model does not have, or a class of the user's own that cannot be loaded.
    """
    if isinstance(config, CustomObjectiveConfig):
        return Checked(load_class(config.name)(config.settings, num_blocks, steps), config.name, num_blocks)
    config = config.at_depth(num_blocks)
    if isinstance(config, RefusalSection):
        return OBJECTIVES[config.name](config, num_blocks, steps, seed)
    return OBJECTIVES[config.name](config, num_blocks, steps)


def roles_of(config: ObjectiveSection) -> tuple[Role, ...]:
    """The roles that an objective reads, known before any model is."""
    if isinstance(config, CustomObjectiveConfig):
        return tuple(load_class(config.name).roles)
    return OBJECTIVES[config.name].required_roles(config)


__all__ = [
    "OBJECTIVES",
    "AnswerLoss",
    "Direction",
    "Distance",
    "HeadKL",
    "Objective",
    "PairwiseCosine",
    "RepBend",
    "Span",
    "Stream",
    "Triplet",
    "Triplets",
    "build_objective",
    "roles_of",
]
