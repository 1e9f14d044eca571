"""What the judges say of an evaluation's answers, kept as they say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from repbend_fast.assessment.answers import key_of
from repbend_fast.assessment.json_rows import AnswerRow, OpinionRow
from repbend_fast.assessment.session import Session
from repbend_fast.console import CountLine
from repbend_fast.data.prompts import Prompt
from repbend_fast.evaluation.judges.protocol import Judge, Opinion

ROWS = 32
"""Rows that a judge is given at once."""
LONGEST_REASON = 500

Prompts = dict[tuple[str, int], Prompt]


def judge_everything(session: Session, judges: Sequence[Judge]) -> list[str]:
    """Each judge's opinions of all answers that have none of its own yet; returns the judges' own names.

    One that keeps its replies is asked again about what it left unparsed: it may have been out of reach.
    """
    prompts, rows = session.prompts(), session.known()
    for judge in judges:
        again = getattr(judge, "asks_again", False)
        todo = [row for row in rows if _unsaid(row["opinions"].get(judge.name), again)]
        with CountLine(f"judged by {judge.name}", len(rows), len(rows) - len(todo)) as progress:
            for start in range(0, len(todo), ROWS):
                for row in _judge_rows(session, judge, todo[start : start + ROWS], prompts):
                    progress.advance(f"{row['side']} {row['suite']} {row['attack']}")
    return list(dict.fromkeys(judge.name for judge in judges))


def _unsaid(opinions: list[OpinionRow] | None, again: bool) -> bool:
    return opinions is None or (again and any(opinion["label"] == "unparsed" for opinion in opinions))


def _judge_rows(session: Session, judge: Judge, rows: list[AnswerRow], prompts: Prompts) -> Iterator[AnswerRow]:
    asked = [prompts[row["suite"], row["index"]] for row in rows for _ in row["answers"]]
    answers = [answer for row in rows for answer in row["answers"]]
    said = iter(judge.judge(asked, answers) if answers else ())
    for row in rows:
        opinions = [_kept(next(said)) for _ in row["answers"]]
        session.opinions.append({"key": key_of(row), "judge": judge.name, "opinions": opinions})
        row["opinions"][judge.name] = opinions
        yield row


def _kept(said: Opinion) -> OpinionRow:
    return {"label": said.label, "reason": said.reason[:LONGEST_REASON], "helpful": said.helpful}
