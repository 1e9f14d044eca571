"""Records of all sources: format, roles, limits, and what is wrong with the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import get_args

from repbend_fast.data.formats import FORMATS, BadField, Format, detect_format
from repbend_fast.data.reading import Row, read_rows
from repbend_fast.data.records import ROLES, BadRecord, Record, Role
from repbend_fast.data.sampling import choice_key
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.errors import UserError

_DETECTION_ROWS = 16


@dataclass
class SourceCounts:
    """What one source gave. ``unused`` counts rows that are fine but left out: unlabelled, or of a role not
    asked for.
    """

    path: str
    format: str = ""
    rows: int = 0
    unused: int = 0
    bad: int = 0
    found: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    taken: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))


@dataclass
class RecordSet:
    """Records per role (limits applied), bad records in file order, and counts per source."""

    records: dict[Role, list[Record]]
    bad: list[BadRecord]
    sources: list[SourceCounts]

    @property
    def unused(self) -> int:
        """Rows left out on purpose, over all sources."""
        return sum(s.unused for s in self.sources)

    def counts(self) -> dict[Role, int]:
        """Records per role."""
        return {role: len(records) for role, records in self.records.items()}

    def summary(self) -> str:
        """One line for the log: records per role, rows not used, bad records skipped."""
        parts = [f"{count} {role}" for role, count in self.counts().items() if count]
        text = f"records: {', '.join(parts) or 'none'}"
        text += f"; {self.unused} rows not used" if self.unused else ""
        return text + (f"; skipped {len(self.bad)} bad records, the first at {self.bad[0].origin}" if self.bad else "")


class _Choice:
    """The ``limit`` records of lowest pseudo-random rank, in their order of arrival; all of them without a limit."""

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit = limit
        self.seed = seed
        self._kept: list[tuple[bytes, int, Record]] = []
        self._arrived = 0

    def add(self, record: Record) -> None:
        key = b"" if self.limit is None else choice_key(self.seed, record)
        self._kept.append((key, self._arrived, record))
        self._arrived += 1
        # Cutting only when twice the limit is held keeps memory bounded and the cost per record constant.
        if self.limit is not None and len(self._kept) >= 2 * self.limit + 64:
            self._cut()

    def records(self) -> list[Record]:
        self._cut()
        return [record for _, _, record in sorted(self._kept, key=lambda k: k[1])]

    def _cut(self) -> None:
        if self.limit is not None and len(self._kept) > self.limit:
            self._kept.sort(key=lambda k: k[:2])
            del self._kept[self.limit :]


def load_records(data: DataConfig | list[SourceConfig], *, seed: int, skip_bad_records: bool) -> RecordSet:
    """Records of all sources, read one row at a time.

    ``limit`` of a source and of ``data`` (per role) choose by seed and text, whatever else is loaded and in whatever
    order. Raises ``UserError`` when a source cannot be read, and, unless ``skip_bad_records``, when there is a bad
    record: the message names the first one, how many there are, and the remedy.
    """
    sources, limit = (data.sources, data.limit) if isinstance(data, DataConfig) else (data, None)
    overall = {role: _Choice(limit, seed) for role in ROLES}
    bad: list[BadRecord] = []
    counts: list[SourceCounts] = []
    for source in sources:
        chosen = {role: _Choice(source.limit, seed) for role in ROLES}
        counted = _load_source(source, chosen, bad)
        counts.append(counted)
        for role, choice in chosen.items():
            records = choice.records()
            counted.taken[role] = len(records)
            for record in records:
                overall[role].add(record)
    if bad and not skip_bad_records:
        raise UserError(bad_records_line(bad))
    return RecordSet({role: choice.records() for role, choice in overall.items()}, bad, counts)


def bad_records_line(bad: list[BadRecord]) -> str:
    """One line: the first bad record, how many there are, and the remedy."""
    total = "1 bad record" if len(bad) == 1 else f"{len(bad)} bad records"
    return (
        f"{bad[0].origin}: {bad[0].reason} ({total} in the data); mend it, list all with `repbend-fast data check`, "
        "or skip with data.skip_bad_records=true"
    )


def _load_source(source: SourceConfig, chosen: dict[Role, _Choice], bad: list[BadRecord]) -> SourceCounts:
    counts = SourceCounts(source.path)
    asked: frozenset[Role] | None = None if source.roles is None else frozenset(source.roles)
    for found in _records_of(source, asked, counts):
        if isinstance(found, BadRecord):
            counts.bad += 1
            bad.append(found)
            continue
        wanted = [r for r in found if asked is None or r.role in asked]
        counts.unused += not wanted
        for record in wanted:
            counts.found[record.role] += 1
            chosen[record.role].add(record)
    if not counts.rows:
        raise UserError(f"{source.path}: holds no records; check data.sources.path and split")
    return counts


def _records_of(
    source: SourceConfig, asked: frozenset[Role] | None, counts: SourceCounts
) -> Iterator[list[Record] | BadRecord]:
    """What each row gives: its records, perhaps none, or why it is bad. Sets ``counts.format`` and counts rows."""
    if "demo" in (source.path, source.format):
        from repbend_fast.data.demo import training_records

        counts.format = "demo"
        for record in training_records(source.split or "train"):
            counts.rows += 1
            yield [record]
        return
    form, rows = _format_of(source, read_rows(source))
    counts.format = form.name if form else "unknown"
    if form and asked and not asked <= set(form.roles):
        missing = ", ".join(r for r in get_args(Role) if r in asked - set(form.roles))
        raise UserError(
            f"{source.path}: data.sources.roles asks for {missing}, but {form.name} gives only {', '.join(form.roles)}"
        )
    for row in rows:
        counts.rows += 1
        if isinstance(row, BadRecord):
            yield row
            continue
        assert form is not None  # a readable row always has a format: `_format_of` raises otherwise
        try:
            yield form.parse(row.fields, row.origin, asked)
        except BadField as reason:
            yield BadRecord(row.origin, str(reason))


def _format_of(
    source: SourceConfig, rows: Iterator[Row | BadRecord]
) -> tuple[Format | None, Iterable[Row | BadRecord]]:
    """The source's format, found from the first rows when it is ``auto``; None when no row is readable. Gives the rows
    back complete.
    """
    if source.format != "auto":
        return FORMATS[source.format], rows
    seen: list[Row | BadRecord] = []
    readable: list[Row] = []
    for row in rows:
        seen.append(row)
        if isinstance(row, BadRecord):
            continue
        readable.append(row)
        form = detect_format(row.fields)
        if form:
            return form, itertools.chain(seen, rows)
        if len(readable) == _DETECTION_ROWS:
            break
    if readable:
        names = ", ".join(list(map(str, readable[0].fields))[:12]) or "(none)"
        raise UserError(
            f"{source.path}: format not recognised from the fields {names}; set format to one of {', '.join(FORMATS)}"
        )
    return None, seen
