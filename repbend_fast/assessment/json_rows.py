"""What the JSON of an evaluation holds: rows of its answers, opinions of judges, and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from repbend_fast.assessment.grid import Kind
from repbend_fast.evaluation.judges.protocol import Judged


class OpinionRow(TypedDict):
    """``evaluation.judges.protocol.Opinion``."""

    label: Judged
    reason: str
    helpful: bool | None


class AnswerRow(TypedDict):
    """A row of ``answers.jsonl``."""

    side: str
    suite: str
    attack: str
    index: int
    source_id: str
    kind: str
    prompt: str
    item: str
    answers: list[str]
    prefills: list[str]
    details: dict[str, object]
    opinions: dict[str, list[OpinionRow]]


class JudgedRow(TypedDict):
    """A row of ``opinions.jsonl``. ``key``: of the answers' row."""

    key: Sequence[str | int]
    judge: str
    opinions: list[OpinionRow]


class Change(TypedDict):
    """The models that one attack made on one side. ``summary``: what it measured on the way."""

    side: str
    suite: str
    attack: str
    variants: list[str]
    summary: Mapping[str, object]


class Rate(TypedDict):
    """A count with its rate, None of nothing, and the rate's interval."""

    count: int
    rate: float | None
    interval: list[float]


class GroupRow(TypedDict):
    """What came of one suite under one attack. ``judges``: by judge, a rate for each label, and ``helpful``.
    ``errors``: prompts that could not be asked; they are among the unparsed.
    """

    side: str
    suite: str
    attack: str
    kind: str
    count: int
    judges: dict[str, dict[str, Rate | None]]
    errors: NotRequired[int]


class PairedRow(TypedDict):
    """Base against bent, prompt by prompt."""

    suite: str
    attack: str
    kind: str
    judge: str
    base_only: int
    bent_only: int
    p_value: float


class AgreementRow(TypedDict):
    """Two judges. ``disagreements``: side, suite, attack and index of each."""

    judges: list[str]
    kappa: float | None
    table: dict[str, dict[str, int]]
    disagreements: list[dict[str, str | int]]


class Judgement(TypedDict):
    """What judged rows come to."""

    groups: list[GroupRow]
    paired: list[PairedRow]
    agreement: list[AgreementRow]


class Summary(Judgement):
    """``eval.json``."""

    format: int
    model: str
    adapter: str | None
    environment: Mapping[str, object]
    settings: Mapping[str, object]
    usefulness: dict[str, Mapping[str, object]]
    relearning: list[dict[str, object]]
    rounding: list[dict[str, object]]
    changes: list[Change]
    failed: list[dict[str, str]]


class Measured(TypedDict):
    """A model under the rule judge: the shares of its labels, and the perplexity of held-out conversations."""

    comply: float
    refuse: float
    degenerate: float
    perplexity: float


class CurvePoint(TypedDict):
    """A fine-tuned model after ``step`` steps. ``perplexity_ratio``: None of one that is ruined."""

    step: int
    loss: float
    comply: float
    refuse: float
    degenerate: float
    perplexity_ratio: float | None


class Training(TypedDict):
    """One way of fine-tuning, on a model whose perplexity was ``start_perplexity``."""

    kind: Kind
    records: int
    learning_rate: float
    rank: int
    template: bool
    steps: int
    batch: int
    seed: int
    start_perplexity: float
    diverged: bool


class TrainingRow(Training):
    """What came of it. A row of ``relearning.jsonl`` has a ``fingerprint`` too."""

    curve: list[CurvePoint]


class WorstCase(Training, CurvePoint):
    """The training and its step that undid most."""
