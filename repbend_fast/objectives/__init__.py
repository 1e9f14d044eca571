"""Objectives: each says which streams, rows, layers, distances and weights it uses."""

import importlib
import pkgutil

from repbend_fast.data.records import Role
from repbend_fast.objectives.base import Objective, Probes
from repbend_fast.objectives.custom import Checked, CustomObjectiveConfig, load_class
from repbend_fast.objectives.registry import OBJECTIVES
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import (
    AnswerLoss,
    BoundaryCosine,
    Direction,
    Distance,
    HeadKL,
    LoweredLabel,
    PairwiseCosine,
    SimplePreference,
    Span,
    Term,
    Triplet,
    Triplets,
    Unlikelihood,
    WeightedAscent,
)

# A method is entered by being in this folder.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def build_objective(config: MethodConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> Objective:
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
    found: Objective = OBJECTIVES[config.name](config.at_depth(num_blocks), num_blocks, steps, seed)
    return found


def roles_of(config: MethodConfig) -> tuple[Role, ...]:
    """The roles that an objective reads, known before any model is."""
    return config.roles


__all__ = [
    "OBJECTIVES",
    "AnswerLoss",
    "BoundaryCosine",
    "Direction",
    "Distance",
    "HeadKL",
    "LoweredLabel",
    "Objective",
    "PairwiseCosine",
    "Probes",
    "SimplePreference",
    "Span",
    "Stream",
    "Term",
    "Triplet",
    "Triplets",
    "Unlikelihood",
    "WeightedAscent",
    "build_objective",
    "roles_of",
]
