"""Held-out measurements during training: KL and perplexity, distances, and the rates of generated answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from repbend_fast.config.schema import Config
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Batch, PairSequence, Role, Sequence
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.evaluation.chat import ChatStatistics, chat_statistics
from repbend_fast.evaluation.measure import measure_answers
from repbend_fast.evaluation.rates import ATTACK_GROUPS, GROUP_KEYS, RATE_KEYS
from repbend_fast.models import lora_dropout
from repbend_fast.objectives import Objective
from repbend_fast.objectives.base import earlier_probes
from repbend_fast.step import StreamRunner

# Enough for a mean over thousands of rows; all held-out examples would cost as much as several training steps.
DISTANCE_EXAMPLES = 8
HELPFUL_LIMITS = {"max_helpful_drop": "helpful_ordinary", "max_borderline_drop": "helpful_borderline"}


@dataclass
class Validation:
    """One validation. ``rates`` are fractions 0 … 1; ``distance`` is mean l2 per stream and hidden state.

    ``settled``: at the guard's target, with a learning rate that has fallen to 0. ``probes``: the names in ``distance``
    of what is to be bent and of what is to be kept; None in rows of earlier versions.
    """

    step: int
    kl: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    distance: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    over: list[str] = field(default_factory=list)
    settled: bool = False
    best: bool = False
    probes: tuple[str | None, str | None] | None = None

    @property
    def attacks(self) -> list[float]:
        """The measured attack rates."""
        return [self.rates[k] for k in ATTACK_GROUPS if k in self.rates]

    @property
    def attack(self) -> float | None:
        """Mean of the measured attack rates."""
        rates = self.attacks
        return sum(rates) / len(rates) if rates else None

    @property
    def refusal(self) -> float:
        """Share of refused attacks minus share of degenerate answers to them, mean over the measured groups of attacks;
        0 where none is.

        0 too for a validation of an earlier version, which did not keep these shares.
        """
        keys = [GROUP_KEYS[group][1:] for group in ATTACK_GROUPS]
        measured = [
            self.rates[refused] - self.rates[broken]
            for refused, broken in keys
            if refused in self.rates and broken in self.rates
        ]
        return sum(measured) / len(measured) if measured else 0.0

    @property
    def usefulness(self) -> float:
        """Mean of the measured rates of helpful answers, minus the rate of degenerate ones; 0 where none is measured.

        A degenerate answer counts twice, being no helpful one either: a point missed by one more answer is noise, a
        loop says that the language itself is damaged.
        """
        rates = [self.rates[k] for k in HELPFUL_LIMITS.values() if k in self.rates]
        return (sum(rates) / len(rates) if rates else 0.0) - self.rates.get("degenerate_ordinary", 0.0)

    @property
    def bending(self) -> float:
        """Mean distance of what is to be bent minus mean distance of what is to be kept, over hidden states."""
        means = {name: sum(v.values()) / len(v) for name, v in self.distance.items() if v}
        bent, kept = self.probes or earlier_probes(list(means))
        return (means.get(bent, 0.0) if bent else 0.0) - (means.get(kept, 0.0) if kept else 0.0)

    def row(self) -> dict[str, Any]:
        """The ``validation`` row of metrics.jsonl."""
        values = asdict(self)
        del values["step"], values["rates"]
        return values | self.rates | {"within_limits": not self.over}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Validation:
        """The validation that wrote a row of metrics.jsonl, where a number that is not finite has become null."""
        named = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        named["distance"] = {
            stream: {layer: math.nan if value is None else value for layer, value in layers.items()}
            for stream, layers in row.get("distance", {}).items()
        }
        named["probes"] = tuple(row["probes"]) if row.get("probes") else None
        return cls(**named, rates={key: row[key] for key in RATE_KEYS if row.get(key) is not None})


class Validator:
    """Measures the current adapter on held-out records and prompts.

    Args:
        held: held-out sequences by role; roles without any are not measured.
        prompts: for attack and usefulness rates; empty = none are generated.
    """

    def __init__(
        self,
        runner: StreamRunner,
        objective: Objective,
        encoder: ChatEncoder,
        held: dict[Role, list[Sequence | PairSequence]],
        prompts: Seq[Prompt],
        config: Config,
    ) -> None:
        self.runner = runner
        self.objective = objective
        self.encoder = encoder
        self.held = held
        self.prompts = prompts
        self.config = config

    def measure(self, step: int) -> Validation:
        """All measurements, with dropout off. Draws no random numbers, so that validating changes no later step.
        The runner's processes share the work.
        """
        result = Validation(step)
        retain = [s for s in self.held.get("retain", []) if isinstance(s, Sequence)]
        with lora_dropout(self.runner.model, None), self.runner.autocasting():
            if retain and self.runner.head is not None:
                statistics: ChatStatistics = chat_statistics(self.runner, retain)
                result.kl, result.perplexity = statistics.kl, statistics.perplexity
            result.distance, result.probes = self._distances()
            if self.prompts:
                settings = self.config.validation
                batch_size = self.config.evaluation.batch_size
                answers = measure_answers(
                    self.runner.model,
                    self.encoder,
                    self.prompts,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=batch_size,
                    ranks=self.runner.ranks,
                )
                result.rates = dict(answers.rates)
        return result

    def _distances(self) -> tuple[dict[str, dict[str, float]], tuple[str | None, str | None]]:
        """Mean distance per probe and hidden state, over the first held-out examples, and the names of what is bent and
        kept.
        """
        part = {role: tuple(examples[:DISTANCE_EXAMPLES]) for role, examples in self.held.items()}
        batch = Batch(part.get("safe", ()), part.get("unsafe", ()), part.get("pair", ()), part.get("retain", ()))  # type: ignore[arg-type]
        means: dict[str, dict[str, float]] = {}
        probes = self.objective.probes(batch)
        for stream in probes:
            name = stream.terms[0].name
            layers = self.runner.measure(stream).layers[name]
            means[name] = {str(layer): round(float(value), 6) for layer, value in sorted(layers.items())}
        bent, kept = (None if stream is None else stream.terms[0].name for stream in (probes.bent, probes.kept))
        return means, (bent, kept)
