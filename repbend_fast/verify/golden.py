"""Golden folders: recorded cases of the published implementations, read as batches and objectives' settings.

A case names its batch, its objective (the default where it names none) and that objective's settings as its publication
spells them. What is read with ``published_quirks`` on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.errors import UserError, one_line
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE, SETTINGS
from repbend_fast.objectives.sections import Entry, MethodConfig

FORM = "a golden folder has expected.json, base_model/, adapter/ and batch.*.json"


@dataclass(frozen=True)
class Case:
    """One recorded value with what it takes to compute it. ``step`` counts from 0, of ``steps``, where weights are
    scheduled.
    """

    key: str
    batch: Batch
    config: MethodConfig
    loss: float
    grad_norm: float
    step: int = 0
    steps: int | None = None


def objective_of(case: Entry) -> str:
    """The name of a case's objective."""
    return str(case.get("objective", DEFAULT_OBJECTIVE))


def read_case(folder: Path, key: str, values: Entry, settings: Entry, expected: Entry) -> Case:
    """A case from its entry (``values``), the entry that holds its settings, and the whole of ``expected.json``.

    Raises:
        KeyError, TypeError, ValueError: the entry lacks something; ``form_of`` reports it.
        UserError: its batch is missing or malformed.
    """
    batch = load_batch(folder / f"batch.{values['batch']}.json")
    config = READERS[objective_of(settings)](settings, expected)
    steps = settings.get("max_steps")
    # Published steps count from 1.
    step = int(settings["step"]) - 1 if steps else 0
    return Case(key, batch, config, float(values["loss"]), float(values["grad_norm"]), step, steps)


def load_batch(path: Path) -> Batch:
    """A recorded batch: ragged lists of token ids per role; ``forget`` is what other methods call unsafe.

    Raises:
        UserError: the file is missing, or not such a batch.
    """
    data = read_json(path)
    with form_of(path):
        retain = tuple(
            _sequence(r["prompt"], r["response"]) if isinstance(r, dict) else Sequence(tuple(r), 0)
            for r in data.get("retain", ())
        )
        pairs = tuple(
            PairSequence(_sequence(p["prompt"], p["unsafe_response"]), _sequence(p["prompt"], p["safe_response"]))
            for p in data.get("pairs", ())
        )
        safe, unsafe, forget = (
            tuple(_sequence(e["prompt"], e["response"]) for e in data.get(role, ()))
            for role in ("safe", "unsafe", "forget")
        )
    return Batch(safe, (*unsafe, *forget), pairs, retain)


@contextmanager
def form_of(path: Path) -> Iterator[None]:
    """Report a file with missing or wrong entries in one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path}: not in the form of a golden folder ({type(error).__name__}: {one_line(error)})"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {FORM}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {FORM}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _sequence(prompt: list[int], answer: list[int]) -> Sequence:
    return Sequence((*prompt, *answer), len(prompt))


READERS: dict[str, Callable[[dict[str, object], dict[str, object]], MethodConfig]] = {
    name: settings.recorded for name, settings in SETTINGS.items() if settings.recorded is not None
}
"""How the settings of each objective's cases are read; these are the objectives that can be verified."""
