"""How the words of a command line read, asked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")


def is_assignment(token: str) -> bool:
    """Whether a token reads as ``key=value``."""
    return _ASSIGNMENT.match(token) is not None


def takes_value(tokens: Sequence[str], i: int) -> bool:
    """Whether ``tokens[i]``, an option without ``=``, is followed by its value. ``-1`` is a value, ``--x`` and
    ``key=value`` are not.
    """
    return i + 1 < len(tokens) and not tokens[i + 1].startswith("--") and not is_assignment(tokens[i + 1])
