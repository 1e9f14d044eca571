"""``repbend-fast compare``, from the search to the table. Whatever is finished already is not done again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from repbend_fast.compare import picture, process, tables
from repbend_fast.compare.comparison import Comparison
from repbend_fast.compare.record import ComparisonRecord, SearchRecord
from repbend_fast.compare.results import comparison_record, method_record, seed_record
from repbend_fast.compare.search import Try, choose, search_record, try_of
from repbend_fast.compare.training import Training, evaluate, measure_before, state, train, training_of
from repbend_fast.console import say, show, terminal_console
from repbend_fast.errors import UserError
from repbend_fast.report.run_record import RunRecord
from repbend_fast.runs.folder import RunFolder, only_writer, write_bytes, write_json, write_text
from repbend_fast.training.trainer import INTERRUPTED


@dataclass
class Progress:
    """Counts the trainings that are known to come."""

    total: int
    done: int = field(default=0)

    def train(self, training: Training) -> RunRecord:
        """Train with a line before and one after. Several jobs print between each other's."""
        self.done += 1
        there = " is there already" if state(training) in ("finished", "diverged") else f"; log: {training.log}"
        say(f"training {self.done}/{self.total}: {training.title}{there}")
        record = train(training)
        say(f"  {training.title}: {_outcome(training, record)}")
        return record


def run_compare(comparison: Comparison, again: str) -> int:
    """Search, train, evaluate, write ``compare.json``, ``compare.md`` and ``compare.png``, print the table.

    Args:
        again: the command line that goes on after Ctrl-C.

    Returns: 0, or 130 after Ctrl-C.

    Raises:
        UserError: a run failed, or another comparison is at work in the folder; what was finished before stays and is
            used again.
    """
    with only_writer(RunFolder(comparison.folder), "comparison", "name another folder with --out"):
        try:
            record = _compare(comparison)
        except KeyboardInterrupt:
            say(f"stopped; what is finished is kept. go on with: {again}")
            return INTERRUPTED
        folder = comparison.folder
        write_json(folder / "compare.json", record)
        write_text(folder / "compare.md", tables.markdown(record))
        write_bytes(folder / "compare.png", picture.png(record))
    show(tables.terminal(record, terminal_console().width))
    for method in record["methods"]:
        say(tables.chosen_line(record, method))
    for remark in tables.remarks(record):
        say(remark)
    say(f"wrote {folder / 'compare.json'}, compare.md and compare.png")
    return 0


def _compare(comparison: Comparison) -> ComparisonRecord:
    """All rates are chosen and all adapters trained before the first test prompt is asked."""
    first_seed, *more_seeds = comparison.seeds
    folder, jobs = comparison.folder, comparison.jobs
    tried = [
        [training_of(folder, method, rate, first_seed) for rate in comparison.rates_of(method)]
        for method in comparison.methods
    ]
    progress = Progress(sum(map(len, tried)) + len(comparison.methods) * len(more_seeds))
    records = iter(process.run_each(jobs, progress.train, [training for trainings in tried for training in trainings]))
    found = [_chosen(comparison, trainings, [next(records) for _ in trainings]) for trainings in tried]
    search = {chosen.method.recipe: how for chosen, how in found}
    trainings = [
        [chosen, *(training_of(folder, chosen.method, chosen.learning_rate, seed) for seed in more_seeds)]
        for chosen, _ in found
    ]
    more = [training for of_method in trainings for training in of_method[1:]]
    for training, record in zip(more, process.run_each(jobs, progress.train, more), strict=True):
        _must_not_diverge(training, record)
    say("measuring the model before training on the test prompts")
    before = measure_before(comparison.methods[0], folder)
    every = [training for of_method in trainings for training in of_method]
    measured = iter(process.run_each(jobs, lambda training: _measured(comparison, training, before), every))
    methods = [
        method_record(
            method.name,
            method.recipe,
            of_method[0].learning_rate,
            [next(measured) for _ in of_method],
            method.config.objective.kind,
        )
        for method, of_method in zip(comparison.methods, trainings, strict=True)
    ]
    return comparison_record(comparison, search, methods, before)


def _chosen(
    comparison: Comparison, trainings: Sequence[Training], records: Sequence[RunRecord]
) -> tuple[Training, SearchRecord]:
    """Of one method's rates the training that was chosen, and the search as it is recorded."""
    tries: Sequence[Try] = [
        try_of(training.learning_rate, record) for training, record in zip(trainings, records, strict=True)
    ]
    name = trainings[0].method.name
    best, why = choose(name, tries)
    say(f"{name}: learning rate {best.learning_rate:g} is chosen ({why})")
    shown = [_shown(comparison, training) for training in trainings]
    return trainings[tries.index(best)], search_record(best, why, list(zip(tries, records, shown, strict=True)))


def _measured(comparison: Comparison, training: Training, before: dict[str, object]) -> dict[str, object]:
    say(f"measuring {training.title} on the test prompts")
    return seed_record(training, evaluate(training, before), _shown(comparison, training))


def _must_not_diverge(training: Training, record: RunRecord) -> None:
    if state(training) == "diverged":
        reason = try_of(training.learning_rate, record).broke_off
        raise UserError(f"{training.title}: {reason}; see {training.log}, and leave this rate or this seed out")


def _outcome(training: Training, record: RunRecord) -> str:
    tried = try_of(training.learning_rate, record)
    if tried.best is None:
        return f"broke off: {tried.broke_off}; see {training.log}"
    attack = "" if tried.best.attack is None else f", attack success {tried.best.attack:.1%} on validation"
    seconds = sum(row["seconds"] for row in record.steps)
    return f"kept step {tried.best.step} of {len(record.steps)}{attack}; {seconds:.0f} s of steps"


def _shown(comparison: Comparison, training: Training) -> str:
    """The run's folder relative to the comparison's, which may be moved."""
    return os.path.relpath(training.folder, comparison.folder)
