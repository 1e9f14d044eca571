"""``repbend-fast data check``: a recipe's sources, with its tokenizer and its model's embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.rule import Rule

from repbend_fast.config.schema import Config
from repbend_fast.console import show
from repbend_fast.data.check import DataReport, check_data, print_report
from repbend_fast.data.tokenizer import Tokenizer


def run_check(config: Config, tokenizer: Tokenizer | None) -> int:
    """Checks ``data.sources`` and ``validation.sources``, shows a report of each, returns the exit code.

    2 with bad records that are not to be skipped, else 0.
    """
    bad = 0
    for name, report in _reports(config, tokenizer):
        if config.validation.sources:
            show(Rule(f"{name}.sources"))
        print_report(report)
        bad += len(report.bad)
    return _exit_code(config, bad)


def check_as_json(config: Config, tokenizer: Tokenizer | None) -> tuple[int, dict[str, object]]:
    """The exit code of :func:`run_check`; and by ``data`` and ``validation`` what its report says, without lengths."""
    found: dict[str, object] = {}
    bad = 0
    for name, report in _reports(config, tokenizer):
        found[name] = {
            "records": report.records.counts(),
            "sources": [asdict(source) for source in report.records.sources],
            "notes": report.notes,
            "bad": [asdict(record) for record in report.bad],
        }
        bad += len(report.bad)
    return _exit_code(config, bad), found


def _exit_code(config: Config, bad: int) -> int:
    return 2 if bad and not config.data.skip_bad_records else 0


def _reports(config: Config, tokenizer: Tokenizer | None) -> Iterator[tuple[str, DataReport]]:
    vocabulary = None
    if tokenizer is not None:
        from repbend_fast.runs.token_ids import check_special_tokens, vocabulary_of

        vocabulary = vocabulary_of(config.model)
        if vocabulary is not None:
            check_special_tokens(tokenizer, vocabulary)
    parts = [("data", config.data)]
    if config.validation.sources:
        parts.append(
            ("validation", config.data.model_copy(update={"sources": config.validation.sources, "limit": None}))
        )
    for name, data in parts:
        yield (
            name,
            check_data(
                data,
                tokenizer,
                seed=config.training.seed,
                vocabulary=vocabulary,
                earlier_turns=config.objective.reads_turns,
            ),
        )
