"""Every side of a model, under every attack, on every suite."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from repbend_fast.assessment.conditions import go_on
from repbend_fast.assessment.costs import Language
from repbend_fast.assessment.session import Cell, Session
from repbend_fast.assessment.target import (
    Subject,
    free_memory_of,
    limit_prompts,
    load_base,
    tokenizer_record,
)
from repbend_fast.console import CountLine, note, say
from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.direct import DirectAttack
from repbend_fast.evaluation.attacks.protocol import Attack, Attacked, Target
from repbend_fast.models import find_decoder
from repbend_fast.planning.budget import budget_bytes


def ask_everything(
    session: Session, subject: Subject, language: Language, settings: Path, *, batch_size: int, seed: int
) -> None:
    """Answers to everything that has none yet: of the base as it is, then with what bends it; and how each of them
    does on ordinary language. Where an attack cannot go on, ``session.failed`` says so, and the others do.

    Raises:
        UserError: the model cannot be loaded, its tokenizer is not the one of the answers that are there, or there is
            no memory. Answers that were given stay.
    """
    todo = {side: session.unfinished(side) for side in session.sides}
    if not any(todo.values()) and not any(language.missing(side) for side in session.sides):
        return
    keys = list(session.asked())
    done = sum(map(session.answered, keys))
    if done and any(todo.values()):
        say(f"{session.folder}: {done} of {len(keys)} prompts are answered; going on with the rest")
    model, encoder = load_base(subject)
    device = find_decoder(model).device
    go_on(settings, {"tokenizer": tokenizer_record(model, encoder)})
    kinds = Counter(
        cell.attack.label
        for side, cells in todo.items()
        for cell in cells
        for key in session.keys(side, cell) or ()
        if not session.answered(key)
    )
    with CountLine("answers", len(keys), done, kinds=kinds) as progress:
        for side, cells in todo.items():
            if side == "bent" and subject.bend is not None and (cells or language.missing(side)):
                model = subject.bend(model)
            for cell in cells:
                limit_prompts(model, encoder, cell.max_new_tokens)
                budget = budget_bytes(subject.config.memory.budget, device)
                _ask_cell(
                    session, cell, side, Target(model, encoder, cell.max_new_tokens, batch_size, budget), seed, progress
                )
            limit_prompts(model, encoder, 0)
            language.measure(side, model, encoder)
    if encoder.truncated.prompts:
        note("prompts longer than the model's positions or 4096 tokens lost their middle")
    # A judge's model is loaded next.
    del model
    gc.collect()
    free_memory_of(device)


def _ask_cell(session: Session, cell: Cell, side: str, target: Target, seed: int, progress: CountLine) -> None:
    ask = _ask_changed if cell.changes_model else _ask_as_it_is
    try:
        ask(session, cell, side, target, seed, progress)
    except UserError as error:
        session.fail(side, cell, error)


def _ask_as_it_is(session: Session, cell: Cell, side: str, target: Target, seed: int, progress: CountLine) -> None:
    # Made anew for every cell: what an attack learns of one model must not reach another.
    _ask(session, cell, side, cell.attack.label, cell.attack.make(), target, seed, progress)


def _ask_changed(session: Session, cell: Cell, side: str, target: Target, seed: int, progress: CountLine) -> None:
    """The prompts as they are, to every model that the attack makes of this one."""
    change = cell.attack.make()
    change.folder = session.change_folder(side, cell)
    prompts = [cell.suite.prompts[index] for index in cell.indices]
    settings = cell.attack.label.partition(":")[2]
    known = len(session.keys(side, cell) or ())
    names: list[str] = []
    # Closed at once whatever happens, so that the weights are as they were before anything else is asked.
    with closing(change.variants(target, prompts, seed=seed)) as variants:
        for variant, changed in variants:
            names.append(f"{variant}:{settings}" if settings else variant)
            if len(names) * len(cell.indices) > known:
                progress.expect(len(cell.indices), cell.attack.label)
            _ask(session, cell, side, names[-1], DirectAttack(), changed, seed, progress)
    session.add_change(side, cell, names, change.summary())


def _ask(
    session: Session,
    cell: Cell,
    side: str,
    name: str,
    attack: Attack,
    target: Target,
    seed: int,
    progress: CountLine,
) -> None:
    part = f"{side} {cell.suite.name} {name}"
    for block in _blocks(session, cell, side, name, attack.white_box, target.batch_size):
        for place, result in _results(attack, target, [cell.suite.prompts[index] for index in block], seed):
            if isinstance(result, UserError):
                session.add_error(side, cell, name, block[place], result)
            elif not session.add(side, cell, name, block[place], result):
                continue
            progress.advance(part, kind=cell.attack.label)
    silent = [i for i in cell.indices if (side, cell.suite.name, name, i) not in session.rows]
    if silent:
        raise RuntimeError(f"{name} gave no answer to {len(silent)} prompts of {cell.suite.name}")
    progress.end_part(part)


def _results(
    attack: Attack, target: Target, prompts: Sequence[Prompt], seed: int
) -> Iterator[tuple[int, Attacked | UserError]]:
    """Each prompt's place with its answers, or with the reason why it alone cannot be asked.

    After an error the prompts that are left are asked one by one.

    Raises:
        UserError: two of them in a row fail for the same reason, which is then no prompt's own.
    """
    left = list(range(len(prompts)))
    try:
        for result in attack.run(target, prompts, seed=seed):
            left.remove(result.index)
            yield result.index, result
        return
    except UserError as error:
        if len(left) == 1:
            yield left[0], error
            return
    reason = ""
    for place in left:
        try:
            found: Attacked | UserError = next(iter(attack.run(target, [prompts[place]], seed=seed)))
        except UserError as error:
            if str(error) == reason:
                raise
            found, reason = error, str(error)
        yield place, found


def _blocks(session: Session, cell: Cell, side: str, name: str, white_box: bool, size: int) -> Iterator[list[int]]:
    """Prompts that are asked together and not all answered. Rounding depends on the company in a batch, so that the
    blocks are the same ones after an interruption; an attack on the weights takes its prompts one after the other.
    """
    missing = session.missing(side, cell, name)
    if white_box:
        yield missing
        return
    by_length = sorted(cell.indices, key=lambda i: (len(cell.suite.prompts[i].text), i))
    for start in range(0, len(by_length), size):
        block = by_length[start : start + size]
        if not set(block).isdisjoint(missing):
            yield block
