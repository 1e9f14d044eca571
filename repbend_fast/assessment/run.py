"""One evaluation: every side of a model, under every attack, on every suite, and what the judges say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from repbend_fast.assessment.answers import ordered
from repbend_fast.assessment.asking import ask_everything
from repbend_fast.assessment.base_answers import find_base
from repbend_fast.assessment.conditions import SETTINGS, go_on, settings_of
from repbend_fast.assessment.costs import Language, find_chat
from repbend_fast.assessment.json_rows import Change, Summary
from repbend_fast.assessment.judging import judge_everything
from repbend_fast.assessment.known_attacks import ATTACKS, EVERY
from repbend_fast.assessment.session import Cell, Session
from repbend_fast.assessment.suites import Suite, different_names, load_suite
from repbend_fast.assessment.summary import FORMAT, summarize, tables
from repbend_fast.assessment.target import Subject, find_subject
from repbend_fast.assessment.trainings import uncounted_line
from repbend_fast.config.overrides import Overlays, Overrides
from repbend_fast.console import say, show
from repbend_fast.environment import environment
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.direct import DirectAttack
from repbend_fast.evaluation.judges.known import JUDGES
from repbend_fast.evaluation.judges.protocol import Judge
from repbend_fast.evaluation.options import Named, parameters
from repbend_fast.runs.folder import RunFolder, only_writer, saving, write_json

DEFAULT_SUITES = ("demo",)
DEFAULT_ATTACKS = ("direct", "prefill", "template")
DEFAULT_JUDGES = ("rule",)
ALL = "all"
REPLIES = "replies.jsonl"
"""What an endpoint has replied, kept as it comes."""


@dataclass(frozen=True)
class Request:
    """What to evaluate and how. Empty ``suites``, ``attacks`` and ``judges`` are the defaults. ``chat``: conversations
    that usefulness is measured on, as ``find_chat`` takes them. ``base_of``: the folder of another evaluation of the
    same model, whose answers of the base are taken.
    """

    target: str
    adapter: str | None = None
    suites: Sequence[str] = ()
    attacks: Sequence[str] = ()
    judges: Sequence[str] = ()
    out: Path | None = None
    chat: str | None = None
    base_of: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    seed: int = 0
    overrides: Overrides = ()
    overlays: Overlays = ()


@dataclass(frozen=True)
class Assessment:
    """A finished evaluation: its folder, and what ``eval.json`` in it holds."""

    folder: Path
    summary: Summary


def assess(request: Request) -> Assessment:
    """Evaluate, or go on with an evaluation that was interrupted; ask nothing that has been answered.

    Raises:
        UserError: anything that must be mended in what is asked for, or a folder that holds another evaluation. Answers
            that were given stay. So do those of the other attacks, in ``eval.json`` too, where one attack fails.
    """
    attacks = [ATTACKS.find(text) for text in _expanded(request.attacks or DEFAULT_ATTACKS)]
    named = [JUDGES.find(text) for text in request.judges or DEFAULT_JUDGES]
    for attack in attacks:
        attack.make()  # what it refuses is said before hours of answers to other ones
    judges: list[Judge] = [judge.make() for judge in named]
    suites = different_names([load_suite(text, request.limit) for text in request.suites or DEFAULT_SUITES])
    chat = find_chat(request.chat, request.suites or DEFAULT_SUITES, request.seed)
    subject = find_subject(request.target, request.adapter, request.overrides, overlays=request.overlays)
    folder = request.out or subject.home
    tokens = [request.max_new_tokens or suite.max_new_tokens for suite in suites]
    settings = settings_of(
        subject,
        suites,
        tokens,
        limit=request.limit,
        seed=request.seed,
        batch_size=request.batch_size,
        attacks=[attack.label for attack in attacks],
        judges=[judge.name for judge in judges],
    )
    cells = [
        Cell(suite, attack, _indices(suite, attack), budget)
        for suite, budget in zip(suites, tokens)
        for attack in attacks
    ]
    with only_writer(RunFolder(folder), "evaluation", "give another --out"):
        base = None if request.base_of is None else find_base(request.base_of, folder, settings)
        _start(folder, settings)
        if base is not None:
            base.give(folder)
        session = Session(folder, subject.sides, cells)
        language = Language(session, chat)
        ask_everything(session, subject, language, folder / SETTINGS, batch_size=request.batch_size, seed=request.seed)
        names = judge_everything(session, [_keeping(judge, folder).make() for judge in named])
        found = Assessment(folder, _finish(session, subject, language, names))
    if session.failed:
        failed = session.failed[0]
        where = f"{failed['attack']} on {failed['side']}, {failed['suite']}"
        raise UserError(f"{where}: {failed['reason']} (everything else is in {folder})")
    return found


def _expanded(attacks: Sequence[str]) -> list[str]:
    """Each once. ``all`` stands for every attack but those that are named beside it, with settings or without."""
    named = {text.partition(":")[0] for text in attacks}
    every = [name for name in EVERY if name not in named]
    return list(dict.fromkeys(name for text in attacks for name in (every if text == ALL else [text])))


def _keeping(judge: Named, folder: Path) -> Named:
    """A judge that can keep its replies keeps them in the folder, where none is named."""
    if "cache" not in parameters(judge.kind) or judge.settings.get("cache"):
        return judge
    return replace(judge, settings={**judge.settings, "cache": str(folder / REPLIES)})


def _indices(suite: Suite, attack: Named) -> tuple[int, ...]:
    """Ordinary and borderline prompts are only asked as they are: they need no attack."""
    everything = issubclass(attack.kind, DirectAttack)
    return tuple(i for i, prompt in enumerate(suite.prompts) if everything or prompt.kind == "attack")


def _start(folder: Path, settings: dict[str, object]) -> None:
    path = folder / SETTINGS
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not path.is_file():
        raise UserError(f"{folder}: exists and holds no evaluation; give another --out")
    with saving("the evaluation", folder):
        folder.mkdir(parents=True, exist_ok=True)
    go_on(path, settings)


def _finish(session: Session, subject: Subject, language: Language, judges: list[str]) -> Summary:
    """Put opinions into the rows, write ``eval.json``, show the tables."""
    session.answers.rewrite(ordered(session.rows, session.asked()))
    session.opinions.path.unlink(missing_ok=True)
    path = session.folder / "eval.json"
    rows = session.known()
    changes = session.changes()
    summary: Summary = {
        "format": FORMAT,
        "model": subject.name,
        "adapter": subject.adapter,
        "environment": environment(),
        "settings": json.loads((session.folder / SETTINGS).read_text(encoding="utf-8")),
        **summarize(rows, judges),
        "usefulness": language.usefulness(rows, judges),
        "relearning": _relearning(changes),
        "rounding": [
            {"side": found["side"], "suite": found["suite"], **found["summary"]} for found in _by(changes, "rounding")
        ],
        "changes": changes,
        "failed": session.failed,
    }
    write_json(path, summary)
    for table in tables(summary):
        show(table)
    for found in _by(changes, "relearning"):
        if line := uncounted_line(found["side"], found["suite"], found["summary"]):
            say(line)
    say(f"wrote {path}")
    return summary


def _relearning(changes: list[Change]) -> list[dict[str, object]]:
    """The curves of all fine-tunings that an attacker tried, each with the side and the suite that it was tried on."""
    return [
        {"side": found["side"], "suite": found["suite"], **row}
        for found in _by(changes, "relearning")
        for row in cast(list[dict[str, object]], found["summary"].get("rows", []))
    ]


def _by(changes: list[Change], attack: str) -> list[Change]:
    return [found for found in changes if found["attack"].partition(":")[0] == attack]
