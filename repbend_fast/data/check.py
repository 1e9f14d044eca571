"""What a check of the data shows: what it holds, how long it is, and which records are bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from repbend_fast.console import say, show
from repbend_fast.data.duplicates import duplicate_lines
from repbend_fast.data.encoded import dropped_reasoning
from repbend_fast.data.records import ROLES, BadRecord, Record, Role, has_earlier_turns
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.data.sources import RecordSet, load_records
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError

PERCENTILES = (5, 25, 50, 75, 95, 99)
SHOWN_BAD = 20
_BAR = 40


@dataclass
class Lengths:
    """Lengths of one role's prompts, answers and wholes (prompt + answer, the longer one of a pair), and how many are
    cut.
    """

    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    cut_prompts: int = 0
    cut_answers: int = 0
    cut_whole: int = 0


@dataclass
class DataReport:
    """The result of a check. ``unit`` is ``tokens`` or ``characters``; the ``cut_…`` counts are 0 in characters.

    ``notes``: what is no mistake in a record and yet worth a look, a line each.
    """

    records: RecordSet
    unit: str
    lengths: dict[Role, Lengths]
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[BadRecord]:
        """Bad records of all sources, those that the chat template refuses last."""
        return self.records.bad


def check_data(
    data: DataConfig | list[SourceConfig],
    tokenizer: Tokenizer | None,
    *,
    seed: int = 42,
    vocabulary: int | None = None,
    earlier_turns: bool = False,
) -> DataReport:
    """Reads everything, measures every record that training would use, and collects bad ones instead of stopping at the
    first.

    ``tokenizer`` None measures characters. A record with a token id from ``vocabulary`` on is bad, and with
    ``earlier_turns`` one whose earlier turns cannot be found.

    Raises ``UserError`` for sources that cannot be read and tokenizers without a chat template.
    """
    limits = data if isinstance(data, DataConfig) else DataConfig(sources=data)
    records = load_records(data, seed=seed, skip_bad_records=True)
    encoder = None
    if tokenizer is not None:
        encoder = ChatEncoder(
            tokenizer,
            limits.max_prompt_tokens,
            limits.max_answer_tokens,
            limits.chat_template_kwargs,
            earlier_turns=earlier_turns,
        )
        encoder.vocabulary = vocabulary
    lengths = {role: Lengths() for role in ROLES}
    for role, of_role in records.records.items():
        for record in of_role:
            try:
                _measure(record, encoder, lengths[role])
            except UserError as error:
                records.bad.append(BadRecord(record.origin, str(error).removeprefix(f"{record.origin}: ")))
    notes = duplicate_lines(records.records) + turn_lines(records.records)
    if encoder:
        notes += dropped_reasoning(records.records, encoder)
    return DataReport(records, "tokens" if encoder else "characters", lengths, notes)


def turn_lines(records: Mapping[Role, Seq[Record]]) -> list[str]:
    """A line for each role with conversations of several turns, or with tools."""
    lines = []
    for role, of_role in records.items():
        counts = {
            "with earlier turns of the assistant": sum(has_earlier_turns(r) for r in of_role if role != "retain"),
            "with tools on offer": sum(bool(r.tools) for r in of_role),
            "with tool results": sum(any(m.role == "tool" for m in r.messages) for r in of_role),
            "with an answer that calls tools": sum(any(turn.calls for turn in r.answers) for r in of_role),
        }
        found = [f"{count} {words}" for words, count in counts.items() if count]
        if found:
            lines.append(f"of {len(of_role)} {role} record{'s' if len(of_role) > 1 else ''}: {', '.join(found)}")
    return lines


def print_report(report: DataReport) -> None:
    """Shows counts per source and role, lengths, truncation, duplicates and bad records."""
    show(_source_table(report.records))
    used = [role for role in ROLES if report.lengths[role].whole]
    if used:
        show(_length_table(report, used))
    for role in used:
        show(Text.assemble((role, "bold"), f": length in {report.unit}"))
        for low, high, count in histogram(report.lengths[role].whole):
            bar = "█" * max(1, round(_BAR * count / len(report.lengths[role].whole))) if count else ""
            say(f"  {low:>7} – {high:<7} {count:>8} {bar}")
    for note in report.notes:
        say(f"note: {note}")
    if not report.bad:
        say("no bad records")
        return
    total = "1 bad record" if len(report.bad) == 1 else f"{len(report.bad)} bad records"
    show(Text.assemble((total, "bold"), f", the first {SHOWN_BAD}:" if len(report.bad) > SHOWN_BAD else ":"))
    for bad in report.bad[:SHOWN_BAD]:
        say(f"  {bad.origin}: {bad.reason}")


def percentile(values: Seq[int], percent: float) -> int:
    """Nearest-rank percentile of a non-empty list."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def histogram(values: Iterable[int]) -> list[tuple[int, int, int]]:
    """``(low, high, count)`` with bounds included; bins double in width from 1 – 15 on, empty ones at either end left
    out.
    """
    counts: dict[int, int] = {}
    for value in values:
        bin_index = max(4, value.bit_length())
        counts[bin_index] = counts.get(bin_index, 0) + 1
    if not counts:
        return []
    return [
        (1 if b == 4 else 1 << (b - 1), (1 << b) - 1, counts.get(b, 0)) for b in range(min(counts), max(counts) + 1)
    ]


def _measure(record: Record, encoder: ChatEncoder | None, lengths: Lengths) -> None:
    if encoder and encoder.earlier_turns:
        encoder.check_renders(record)
    prompt, answer = encoder.measure(record) if encoder else _characters(record)
    lengths.whole.append(prompt + answer)
    if record.role != "retain":
        lengths.prompts.append(prompt)
        lengths.answers.append(answer)
    if encoder and record.role == "retain":
        lengths.cut_whole += prompt + answer > encoder.max_prompt_tokens + encoder.max_answer_tokens
    elif encoder:
        lengths.cut_prompts += prompt > encoder.max_prompt_tokens
        lengths.cut_answers += answer > encoder.max_answer_tokens


def _characters(record: Record) -> tuple[int, int]:
    return sum(len(m.content) for m in record.messages), max(len(record.answer), len(record.safe_answer))


def _source_table(records: RecordSet) -> Table:
    table = Table(title="records")
    for column in ("source", "format"):
        table.add_column(column, overflow="fold")
    for column in ("rows", *ROLES, "unused", "bad"):
        table.add_column(column, justify="right")
    for s in records.sources:
        roles = [str(s.taken[r]) if s.taken[r] == s.found[r] else f"{s.taken[r]}/{s.found[r]}" for r in ROLES]
        table.add_row(escape(s.path), s.format, str(s.rows), *roles, str(s.unused), str(s.bad))
    if len(records.sources) > 1 or any(
        sum(s.taken[r] for s in records.sources) != n for r, n in records.counts().items()
    ):
        rows = str(sum(s.rows for s in records.sources))
        bad = str(sum(s.bad for s in records.sources))
        table.add_section()
        table.add_row(
            "used", "", rows, *(str(records.counts()[r]) for r in ROLES), str(records.unused), bad, style="bold"
        )
    return table


def _length_table(report: DataReport, used: list[Role]) -> Table:
    table = Table(title=f"lengths in {report.unit}")
    for column in ("role", "part"):
        table.add_column(column)
    for column in (*(f"{p} %" for p in PERCENTILES), "longest", *(["truncated"] if report.unit == "tokens" else [])):
        table.add_column(column, justify="right")
    for role in used:
        lengths = report.lengths[role]
        parts = [("prompt", lengths.prompts, lengths.cut_prompts), ("answer", lengths.answers, lengths.cut_answers)]
        if role == "retain":
            parts = [("whole", lengths.whole, lengths.cut_whole)]
        for name, values, cut in parts:
            cells = [str(percentile(values, p)) for p in PERCENTILES] + [str(max(values))]
            table.add_row(role, name, *cells, *([str(cut)] if report.unit == "tokens" else []))
    return table
