"""``repbend-fast data check``: a recipe's sources, with its tokenizer and its model's embedding."""

from __future__ import annotations

from rich.rule import Rule

from repbend_fast.config.schema import Config
from repbend_fast.console import show
from repbend_fast.data.check import check_data, print_report
from repbend_fast.data.tokenizer import Tokenizer


def run_check(config: Config, tokenizer: Tokenizer | None) -> int:
    """Checks ``data.sources`` and ``validation.sources``, shows a report of each, returns the exit code.

    2 with bad records that are not to be skipped, else 0.
    """
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
    bad = 0
    for name, data in parts:
        if len(parts) > 1:
            show(Rule(f"{name}.sources"))
        report = check_data(data, tokenizer, seed=config.training.seed, vocabulary=vocabulary)
        print_report(report)
        bad += len(report.bad)
    return 2 if bad and not config.data.skip_bad_records else 0
