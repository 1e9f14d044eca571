"""One evaluation: every side of a model, under every attack, on every suite, and what the judges say."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from repbend_fast.assessment.answers import Key, Opinions, RowFile, key_of, ordered
from repbend_fast.assessment.known_attacks import ATTACKS
from repbend_fast.assessment.settings import go_on, settings_of
from repbend_fast.assessment.suites import Suite, different_names, load_suite
from repbend_fast.assessment.summary import FORMAT, summarize, tables
from repbend_fast.assessment.target import (
    Subject,
    find_subject,
    free_memory_of,
    limit_prompts,
    load_base,
    tokenizer_record,
)
from repbend_fast.config.overrides import Overlays, Overrides
from repbend_fast.console import CountLine, note, say, show
from repbend_fast.data.prompts import Prompt
from repbend_fast.environment import environment
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.direct import DirectAttack
from repbend_fast.evaluation.attacks.protocol import Attack, Attacked, Target
from repbend_fast.evaluation.judges.known import JUDGES
from repbend_fast.evaluation.judges.protocol import Judge
from repbend_fast.evaluation.measure import PREFILL
from repbend_fast.evaluation.options import Named
from repbend_fast.models import find_decoder
from repbend_fast.planning.budget import budget_bytes
from repbend_fast.runs.folder import RunFolder, only_training, saving, write_json

DEFAULT_SUITES = ("demo",)
DEFAULT_ATTACKS = ("direct", "prefill", "template")
DEFAULT_JUDGES = ("rule",)
EVERY = "all"
SETTINGS = "settings.json"
JUDGE_ROWS = 32
LONGEST_REASON = 500


@dataclass(frozen=True)
class Request:
    """What to evaluate and how. Empty ``suites``, ``attacks`` and ``judges`` are the defaults."""

    target: str
    adapter: str | None = None
    suites: Sequence[str] = ()
    attacks: Sequence[str] = ()
    judges: Sequence[str] = ()
    out: Path | None = None
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
    summary: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The prompts of one suite that one attack asks, by index."""

    suite: Suite
    attack: Named
    indices: tuple[int, ...]
    max_new_tokens: int

    def keys(self, side: str) -> list[Key]:
        return [(side, self.suite.name, self.attack.label, index) for index in self.indices]


@dataclass
class Session:
    """An evaluation's folder while it is worked on."""

    folder: Path
    request: Request
    subject: Subject
    cells: list[Cell]
    answers: RowFile
    opinions: RowFile
    rows: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {key_of(row): row for row in self.answers.rows}
        for said in self.opinions.rows:
            if (key := tuple(said["key"])) in self.rows:
                self.rows[key]["opinions"][said["judge"]] = said["opinions"]

    def missing(self, cell: Cell, side: str) -> list[int]:
        return [key[3] for key in cell.keys(side) if key not in self.rows]

    def asked(self) -> Iterator[Key]:
        """The keys of this evaluation, in the order of its records."""
        for side in self.subject.sides:
            for cell in self.cells:
                yield from cell.keys(side)

    def add(self, cell: Cell, side: str, index: int, result: Attacked) -> None:
        """Write the answers to one prompt."""
        prompt = cell.suite.prompts[index]
        row = {
            "side": side,
            "suite": cell.suite.name,
            "attack": cell.attack.label,
            "index": index,
            "source_id": prompt.source_id,
            "kind": prompt.kind,
            "prompt": prompt.text,
            "item": prompt.item,
            "answers": list(result.answers),
            "prefills": list(result.prefills),
            "details": result.details,
            "opinions": {},
        }
        self.answers.append(row)
        self.rows[key_of(row)] = row


def assess(request: Request) -> Assessment:
    """Evaluate, or go on with an evaluation that was interrupted; ask nothing that has been answered.

    Raises:
        UserError: anything that must be mended in what is asked for, or a folder that holds another evaluation. Answers
            that were given stay.
    """
    attacks = [ATTACKS.find(text) for text in _expanded(request.attacks or DEFAULT_ATTACKS)]
    judges = [JUDGES.find(text) for text in request.judges or DEFAULT_JUDGES]
    suites = different_names([load_suite(text, request.limit) for text in request.suites or DEFAULT_SUITES])
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
        judges=[judge.label for judge in judges],
    )
    cells = [
        Cell(suite, attack, _indices(suite, attack), budget)
        for suite, budget in zip(suites, tokens)
        for attack in attacks
    ]
    with only_training(RunFolder(folder), "evaluation", "give another --out"):
        _start(folder, settings)
        session = Session(
            folder, request, subject, cells, RowFile(folder / "answers.jsonl"), RowFile(folder / "opinions.jsonl")
        )
        _ask(session)
        names = _judge(session, judges)
        return Assessment(folder, _finish(session, names))


def _expanded(attacks: Sequence[str]) -> list[str]:
    """``all`` stands for every attack that there is; each is asked once."""
    return list(dict.fromkeys(name for text in attacks for name in (ATTACKS.names() if text == EVERY else [text])))


def _indices(suite: Suite, attack: Named) -> tuple[int, ...]:
    """Ordinary and borderline prompts are only asked as they are: they need no attack."""
    everything = issubclass(attack.kind, DirectAttack)
    return tuple(i for i, prompt in enumerate(suite.prompts) if everything or prompt.kind == "attack")


def _start(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not path.is_file():
        raise UserError(f"{folder}: exists and holds no evaluation; give another --out")
    with saving("the evaluation", folder):
        folder.mkdir(parents=True, exist_ok=True)
    go_on(path, settings)


# -- asking


def _ask(session: Session) -> None:
    """Answers to everything that has none yet: the base as it is, then with what bends it."""
    sides = session.subject.sides
    todo = {side: [cell for cell in session.cells if session.missing(cell, side)] for side in sides}
    count = sum(len(session.missing(cell, side)) for side in sides for cell in todo[side])
    if not count:
        return
    total = sum(1 for _ in session.asked())
    if count < total:
        say(f"{session.folder}: {total - count} of {total} prompts are answered; going on with the rest")
    model, encoder = load_base(session.subject)
    device = find_decoder(model).device
    go_on(session.folder / SETTINGS, {"tokenizer": tokenizer_record(model, encoder)})
    with CountLine("answers", total, total - count) as progress:
        for side in sides:
            if side == "bent" and session.subject.bend is not None and todo[side]:
                model = session.subject.bend(model)
            for cell in todo[side]:
                limit_prompts(model, encoder, cell.max_new_tokens)
                budget = budget_bytes(session.subject.config.memory.budget, device)
                target = Target(model, encoder, cell.max_new_tokens, session.request.batch_size, budget)
                _ask_cell(session, cell, side, target, progress)
    if cut := encoder.truncated.prompts:
        note(f"{cut} prompts were longer than the model's positions or 4096 tokens, and lost their middle")
    del model, target
    gc.collect()
    free_memory_of(device)


def _ask_cell(session: Session, cell: Cell, side: str, target: Target, progress: CountLine) -> None:
    """An attack of its own for every cell: what it learns of one model must not reach another."""
    attack: Attack = cell.attack.make()
    part = f"{side} {cell.suite.name} {cell.attack.label}"
    for block in _blocks(session, cell, side, attack, target.batch_size):
        prompts = [_with_target(cell.suite.prompts[i], attack.needs_target) for i in block]
        for result in attack.run(target, prompts, seed=session.request.seed):
            index = block[result.index]
            if (side, cell.suite.name, cell.attack.label, index) not in session.rows:
                session.add(cell, side, index, result)
                progress.advance(part)
    if left := session.missing(cell, side):
        raise RuntimeError(f"{cell.attack.label} gave no answer to {len(left)} prompts of {cell.suite.name}")
    progress.end_part(part)


def _blocks(session: Session, cell: Cell, side: str, attack: Attack, size: int) -> Iterator[list[int]]:
    """Prompts that are asked together and not all answered. Rounding depends on the company in a batch, so that the
    blocks are the same ones after an interruption; an attack on the weights takes its prompts one after the other.
    """
    missing = set(session.missing(cell, side))
    if attack.white_box:
        yield sorted(missing)
        return
    by_length = sorted(cell.indices, key=lambda i: (len(cell.suite.prompts[i].text), i))
    for start in range(0, len(by_length), size):
        block = by_length[start : start + size]
        if missing.intersection(block):
            yield block


def _with_target(prompt: Prompt, wanted: bool) -> Prompt:
    return replace(prompt, target=PREFILL) if wanted and not prompt.target else prompt


# -- judging


def _judge(session: Session, judges: Sequence[Named]) -> list[str]:
    """Each judge's opinions of all answers, kept as they come; returns the judges' own names."""
    prompts = {(cell.suite.name, i): cell.suite.prompts[i] for cell in session.cells for i in cell.indices}
    rows = [session.rows[key] for key in session.asked()]
    names = []
    for named in judges:
        judge: Judge = named.make()
        names.append(judge.name)
        todo = [row for row in rows if judge.name not in row["opinions"]]
        with CountLine(f"judged by {judge.name}", len(rows), len(rows) - len(todo)) as progress:
            for start in range(0, len(todo), JUDGE_ROWS):
                for row in _judge_rows(session, judge, todo[start : start + JUDGE_ROWS], prompts):
                    progress.advance(row["suite"])
    return list(dict.fromkeys(names))


def _judge_rows(
    session: Session, judge: Judge, rows: list[dict[str, Any]], prompts: dict[tuple[str, int], Prompt]
) -> Iterator[dict[str, Any]]:
    asked = [prompts[row["suite"], row["index"]] for row in rows for _ in row["answers"]]
    said = iter(judge.judge(asked, [answer for row in rows for answer in row["answers"]]))
    for row in rows:
        opinions = [asdict(next(said)) for _ in row["answers"]]
        for opinion in opinions:
            opinion["reason"] = opinion["reason"][:LONGEST_REASON]
        session.opinions.append(asdict(Opinions(key_of(row), judge.name, opinions)))
        row["opinions"][judge.name] = opinions
        yield row


# -- the end


def _finish(session: Session, judges: list[str]) -> dict[str, Any]:
    """Put opinions into the rows, write ``eval.json``, show the tables."""
    session.answers.rewrite(ordered(session.rows, session.asked()))
    session.opinions.path.unlink(missing_ok=True)
    path = session.folder / "eval.json"
    rows = [session.rows[key] for key in session.asked()]
    summary = {
        "format": FORMAT,
        "model": session.subject.name,
        "adapter": session.subject.adapter,
        "environment": environment(),
        "settings": json.loads((session.folder / SETTINGS).read_text(encoding="utf-8")),
        **summarize(rows, judges),
        "usefulness": {},
        "relearning": [],
    }
    write_json(path, summary)
    for table in tables(summary):
        show(table)
    say(f"wrote {path}")
    return summary
