"""The numbers of a comparison: one record per method and seed, and over the seeds median and spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from repbend_fast.compare.comparison import Comparison
from repbend_fast.compare.record import ComparisonRecord, MethodRecord, SearchRecord
from repbend_fast.compare.training import Training
from repbend_fast.environment import environment
from repbend_fast.evaluation.rates import KEYS, Side, evasive_counts
from repbend_fast.report.run_record import RunRecord

MEASURES = (*KEYS, "perplexity_ratio", "seconds", "peak_memory_bytes")


def seed_record(training: Training, record: RunRecord, shown: str) -> dict[str, object]:
    """The test evaluation of one run's kept adapter, and what its training cost.

    ``seconds`` are those of the steps alone, validation not counted; ``peak_memory_bytes`` is the process's peak up to
    its last step. ``evasive``: by group of attacks, how many of the refused answers only talk about something else.
    """
    found = {key: record.after[key] for key in KEYS if record.after.get(key) is not None}
    peaks = [row["peak_memory_bytes"] for row in record.steps]
    return {
        "seed": training.seed,
        "folder": shown,
        "best_step": record.best_step,
        "steps": record.steps[-1]["step"],
        "stopped": None if record.stop is None else record.stop["reason"],
        **found,
        **ratio(found, record.before),
        "seconds": round(sum(row["seconds"] for row in record.steps), 3),
        "peak_memory_bytes": max(peaks),
        "counts": record.after.get("counts", {}),
        "evasive": evasive_counts(record.after),
    }


def ratio(found: Side, before: Side) -> dict[str, float]:
    """``perplexity_ratio`` to the model before training, where both were measured."""
    now, then = found.get("perplexity"), before.get("perplexity")
    return {} if now is None or not then else {"perplexity_ratio": now / then}


def method_record(
    name: str, recipe: str, learning_rate: float, seeds: Sequence[Mapping[str, object]], kind: str = "bending"
) -> MethodRecord:
    """A method over its seeds. A measure that one seed lacks (or that is not finite there) has no median: the rest
    would flatter it.
    """
    values = {key: [value for seed in seeds if _finite(value := seed.get(key))] for key in MEASURES}
    whole = {key: found for key, found in values.items() if len(found) == len(seeds)}
    return {
        "name": name,
        "kind": kind,
        "recipe": recipe,
        "learning_rate": learning_rate,
        "seeds": list(seeds),
        "median": {key: statistics.median(found) for key, found in whole.items()},
        "spread": {key: [min(found), max(found)] for key, found in whole.items()},
    }


def _finite(value: Any) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def before_record(before: Side) -> dict[str, object]:
    """The model before training, without its answers: they are in ``before.json``."""
    found = {key: before[key] for key in KEYS if before.get(key) is not None}
    return {**found, **ratio(found, before), "counts": before.get("counts", {})}


def comparison_record(
    comparison: Comparison,
    search: Mapping[str, SearchRecord],
    methods: Sequence[MethodRecord],
    before: Side,
) -> ComparisonRecord:
    """What ``compare.json`` holds."""
    config = comparison.methods[0].config
    return {
        "environment": environment(),
        "settings": {
            "model": config.model.name,
            "steps": config.training.steps,
            "batch": config.training.examples * config.training.accumulation,
            "validation_every": config.validation.every,
            "seeds": list(comparison.seeds),
            "rates": list(comparison.rates),
            "recipe_rates": comparison.recipe_rates,
            "recipes": [method.recipe for method in comparison.methods],
            "overrides": list(comparison.overrides),
            "overlays": list(comparison.overlays),
            "jobs": comparison.jobs,
        },
        "search": dict(search),
        "methods": list(methods),
        "before": before_record(before),
    }
