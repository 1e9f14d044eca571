"""What bending cost in usefulness: measured with the model at hand, kept for an evaluation that goes on, summed up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

from repbend_fast.assessment.json_rows import AnswerRow
from repbend_fast.assessment.session import Session
from repbend_fast.assessment.suites import DEMOS
from repbend_fast.assessment.summary import label_of
from repbend_fast.assessment.target import positions_of
from repbend_fast.console import note
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Record
from repbend_fast.data.records import Sequence as Ids
from repbend_fast.data.settings import SourceConfig
from repbend_fast.data.sources import load_records
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import Answer
from repbend_fast.evaluation.judges.protocol import JUDGED, Opinion
from repbend_fast.evaluation.usefulness import (
    LanguageStatistics,
    answer_statistics,
    language_statistics,
    over_refusal,
    usefulness,
)
from repbend_fast.models.causal import CausalLM
from repbend_fast.runs.folder import write_json

MOST_CONVERSATIONS = 64
"""Conversations that language is measured on, chosen by the seed."""
OWN_ANSWERS = "the base's own answers"
NOT_MEASURED = "no conversations to measure perplexity and KL on; name some with --chat FILE, records of role retain"


Prompts = Mapping[tuple[str, int], Prompt]


@dataclass(frozen=True)
class Chat:
    """Ordinary conversations, each a request with an answer, and where they come from."""

    source: str
    records: tuple[Record, ...]

    def fingerprint(self) -> str:
        """Hash of the texts: what was measured on the same ones is not measured again."""
        texts = [[self.source], *([*((m.role, m.content) for m in r.messages), r.answer] for r in self.records)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def encoded(self, encoder: ChatEncoder) -> list[Ids]:
        """Ids of each conversation, with the answer apart: its rows are what counts."""
        found = [encoder.encode(record, count=False) for record in self.records]
        return [sequence for sequence in found if isinstance(sequence, Ids)]


def find_chat(name: str | None, suites: Sequence[str], seed: int) -> Chat | None:
    """The conversations that ``--chat`` names, else those that the first of the demo's suites holds out; None where
    there are neither.

    Args:
        name: ``demo``, or ``demo-`` and another split (``assessment.suites``), a file of records, or ``owner/name`` on
            the hub.
        suites: as they were asked for.

    Raises:
        UserError: records that cannot be read, or none of role retain among them.
    """
    name = name or next((suite for suite in suites if suite in DEMOS), None)
    if name is None:
        return None
    source = SourceConfig(path="demo", split=DEMOS[name]) if name in DEMOS else SourceConfig(path=name)
    source = source.model_copy(update={"limit": MOST_CONVERSATIONS})
    found = load_records([source], seed=seed, skip_bad_records=False).records["retain"]
    records = tuple(r.taken("safe") for r in found if len(r.messages) > 1)
    if not records:
        raise UserError(f"--chat {name}: no conversations in it (role retain); perplexity and KL are measured on them")
    return Chat(name, records)


class Numbers(TypedDict):
    """:class:`LanguageStatistics` as a file holds them."""

    perplexity: float
    tokens: int
    reference_perplexity: float | None
    perplexity_ratio: float | None
    kl: float | None
    first_kl: float | None


class Kept(TypedDict):
    """What was measured of one side, and on which conversations."""

    fingerprint: str
    conversations: str
    count: int
    statistics: Numbers


class Language:
    """Perplexity and distance from the base of each side, kept in a file of the folder."""

    def __init__(self, session: Session, chat: Chat | None) -> None:
        self._session, self._chat = session, chat
        self._path = session.folder / "language.json"
        self._kept = _read(self._path)

    def missing(self, side: str) -> bool:
        """Whether the side is still to be measured. The base's own answers are there once it has been asked."""
        chat = self._conversations()
        kept = self._kept.get(side)
        return chat is not None and (kept is None or kept["fingerprint"] != chat.fingerprint())

    def measure(self, side: str, model: CausalLM, encoder: ChatEncoder) -> None:
        """Measure the side now, unless that was done. A failure is a note: answers matter more."""
        chat = self._conversations()
        if chat is None or not self.missing(side):
            return
        positions = positions_of(model)
        sequences = [s for s in chat.encoded(encoder) if positions is None or len(s) <= positions]
        try:
            found = language_statistics(model, sequences)
        except UserError as error:
            note(f"{side}: perplexity and KL were not measured: {error}")
            return
        self._kept[side] = {
            "fingerprint": chat.fingerprint(),
            "conversations": chat.source,
            "count": len(sequences),
            "statistics": cast(Numbers, asdict(found)),
        }
        write_json(self._path, self._kept)

    def usefulness(self, rows: Sequence[AnswerRow], judges: Sequence[str]) -> dict[str, Mapping[str, object]]:
        """Each side's measures by name. Refusals are as the first judge has them."""
        if self._conversations() is None:
            note(NOT_MEASURED)
        return {
            side: self._of_side(side, [row for row in rows if row["side"] == side], judges)
            for side in self._session.sides
        }

    def _of_side(self, side: str, rows: Sequence[AnswerRow], judges: Sequence[str]) -> dict[str, object]:
        kept = None if self.missing(side) else self._kept.get(side)
        language = LanguageStatistics(**kept["statistics"]) if kept else None
        found = usefulness(
            language,
            answer_statistics(list(_answers(rows))),
            over_refusal(*_borderline(rows, judges[0], self._session.prompts())),
        )
        return {
            **{"first_token_kl" if name == "first_kl" else name: value for name, value in found.items()},
            "conversations": kept["conversations"] if kept else None,
            "conversation_count": kept["count"] if kept else None,
        }

    def _conversations(self) -> Chat | None:
        return self._chat or _own_answers(self._session)


def _read(path: Path) -> dict[str, Kept]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read; remove it, and it is measured again") from error


def _questions(rows: Sequence[AnswerRow]) -> Iterator[AnswerRow]:
    return (row for row in rows if row["attack"] == "direct" and row["kind"] != "attack" and row["answers"])


def _answers(rows: Sequence[AnswerRow]) -> Iterator[Answer]:
    """Answers to ordinary and borderline questions, with the lengths that were counted as they were written."""
    for row in _questions(rows):
        tokens, stopped = row["details"].get("tokens"), row["details"].get("stopped")
        if isinstance(tokens, int) and isinstance(stopped, bool):
            yield Answer(row["answers"][0], tokens, stopped)


def _borderline(rows: Sequence[AnswerRow], judge: str, known: Prompts) -> tuple[list[Prompt], list[Opinion]]:
    prompts: list[Prompt] = []
    opinions: list[Opinion] = []
    for row in _questions(rows):
        label = label_of(row["opinions"].get(judge, []))
        prompts.append(known[row["suite"], row["index"]])
        opinions.append(Opinion(next(each for each in JUDGED if each == label)))
    return prompts, opinions


def _own_answers(session: Session) -> Chat | None:
    """What the base answers to ordinary prompts, where nothing better is there: on it the base is at its best."""
    found: list[Record] = []
    prompts = session.prompts()
    for key in session.asked():
        row = session.rows.get(key)
        if row and key[0] == "base" and key[2] == "direct" and row["kind"] == "ordinary" and any(row["answers"]):
            prompt = prompts[key[1], key[3]]
            turns, answer = prompt.conversation(), row["answers"][0]
            found.append(Record("safe", turns, answer, origin=prompt.source_id, tools=prompt.tools))
    return Chat(OWN_ANSWERS, tuple(found[:MOST_CONVERSATIONS])) if found else None
