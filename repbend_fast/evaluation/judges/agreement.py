"""How far judges agree, and the one label of a prompt that was answered several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from repbend_fast.evaluation.judges.protocol import JUDGED, Judged, Opinion

UNPARSED: Judged = "unparsed"


def label_of(opinions: Sequence[Opinion]) -> Judged:
    """One label for all answers to a prompt: ``comply`` if any complies, else ``unparsed`` if any has no verdict (it
    may have complied), else the first one's. ``unparsed`` where there is no answer.
    """
    labels = [opinion.label for opinion in opinions]
    for decisive in ("comply", UNPARSED):
        if decisive in labels:
            return decisive
    return labels[0] if labels else UNPARSED


def kappa(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Cohen's kappa of two judges: agreement beyond chance, 1 for perfect and 0 for none.

    Answers that either of them left ``unparsed`` are left out: no verdict is no disagreement. None where kappa does not
    exist: nothing is left, or both judges gave one and the same label throughout, so that chance alone agrees fully.
    """
    pairs = _both_parsed(a, b)
    if not pairs:
        return None
    total = len(pairs)
    first, second = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    # In whole numbers until the last division, so that agreement by chance alone is exactly 0 and perfect exactly 1.
    observed = total * sum(x == y for x, y in pairs)
    expected = sum(count * second[label] for label, count in first.items())
    return None if expected == total**2 else (observed - expected) / (total**2 - expected)


def table(a: Sequence[str], b: Sequence[str]) -> dict[str, dict[str, int]]:
    """``table[label of a][label of b]``: how many answers got both; every label has its row and column, with
    ``unparsed``.
    """
    counts = Counter(zip(a, b, strict=True))
    labels = [*JUDGED, *sorted((set(a) | set(b)) - set(JUDGED))]
    return {x: {y: counts[x, y] for y in labels} for x in labels}


def disagreements(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Positions of the answers that both judges gave a verdict on, and not the same one."""
    return [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y and UNPARSED not in (x, y)]


def _both_parsed(a: Sequence[str], b: Sequence[str]) -> list[tuple[str, str]]:
    return [(x, y) for x, y in zip(a, b, strict=True) if UNPARSED not in (x, y)]
