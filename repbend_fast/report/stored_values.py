"""Values as a run's files hold them: files may have been edited, or written by another version, so nothing is taken to
be of the kind that it should be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def fraction(value: object) -> float | None:
    """A number from 0 to 1, None for anything else."""
    number = finite_number(value)
    return number if number is not None and 0 <= number <= 1 else None


def finite_number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole(value: object) -> int | None:
    """A count, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def rows_of(value: object) -> list[Mapping[str, object]]:
    """The mappings in a list, nothing of anything else."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def mapping_of(value: object) -> Mapping[str, object]:
    """A mapping, an empty one of anything else."""
    return value if isinstance(value, Mapping) else {}
