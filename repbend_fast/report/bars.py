"""Bars of shares with their intervals, as inline SVG that is as wide as its place: lengths are per cent, so neither
strokes nor whiskers change with the width. The numbers stand beside them as text of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from repbend_fast.report.shares import Division, Share

HEIGHT = 16
_MIDDLE = HEIGHT // 2
CLASSES = {
    "complied": "complied",
    "helpful": "helpful",
    "answered": "helpful",
    "answered, not helpful": "beside",
    "refused": "refused",
    "degenerate": "degenerate",
    "unparsed": "unparsed",
}
ATTACK_COLUMNS = (("complied",), ("refused",), ("degenerate", "unparsed"))
QUESTION_COLUMNS = (
    ("helpful", "answered"),
    ("answered, not helpful",),
    ("refused",),
    ("degenerate", "unparsed"),
)


def columns_of(found: Iterable[Division], hostile: bool) -> list[tuple[str, ...]]:
    """The outcomes that stand in one column, for those columns that any of the divisions fills."""
    there = {name for each in found for name in each.shares}
    shown = (tuple(n for n in names if n in there) for names in (ATTACK_COLUMNS if hostile else QUESTION_COLUMNS))
    return [names for names in shown if names]


def bar(division: Division, names: Sequence[str]) -> Markup:
    """The shares ``names`` of one division from the left on a track of 100 %; a whisker for the first interval."""
    parts, left = [Markup('<rect class="track" width="100%" height="{}"/>').format(HEIGHT)], 0.0
    for outcome in names:
        width = 100 * division.rate(outcome)
        parts.append(
            Markup('<rect class="{}" x="{:.3f}%" width="{:.3f}%" height="{}"/>').format(
                CLASSES[outcome], left, width, HEIGHT
            )
        )
        left += width
    share = division.shares.get(names[0])
    if share is not None and share.interval:
        parts += _whisker(*(100 * end for end in share.interval))
    label = ", ".join(in_words(outcome, division.shares[outcome]) for outcome in names if outcome in division.shares)
    return Markup('<svg class="bar" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, HEIGHT, Markup("").join(parts)
    )


def _whisker(low: float, high: float) -> list[Markup]:
    """A line from end to end and a stroke at each, inside of the track even at 0 and 100 %."""
    line = Markup('<line class="whisker" x1="{:.3f}%" x2="{:.3f}%" y1="{}" y2="{}"/>')
    inside = (min(max(end, 0.15), 99.85) for end in (low, high))
    ends = [line.format(x, x, _MIDDLE - 4, _MIDDLE + 4) for x in inside]
    return [line.format(low, high, _MIDDLE, _MIDDLE), *ends]


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def interval_text(share: Share) -> str:
    """``80.4–96.7``, empty without an interval."""
    return "–".join(f"{100 * end:.1f}" for end in share.interval) if share.interval else ""


def in_words(outcome: str, share: Share) -> str:
    """``complied 91.7 % (80.4–96.7)``."""
    ends = interval_text(share)
    return f"{outcome} {percent(share.rate)}{f' ({ends})' if ends else ''}"
