"""What a run's folder holds, read so that a missing or torn part only makes the report shorter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from repbend_fast.errors import UserError
from repbend_fast.report.eval_record import SUMMARY, EvalRecord, Row, json_mapping, read_evals
from repbend_fast.runs.folder import RunFolder


@dataclass(slots=True)
class RunRecord:
    """The rows of ``metrics.jsonl`` by type, the evaluation's two sides, and the configuration as text and as a
    mapping.

    ``label``: what the run is called on a page. ``evals``: what ``repbend-fast eval`` left in the folder.
    ``unreadable``: a line for each file that is there and cannot be read.
    """

    folder: Path
    label: str = ""
    steps: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    evaluation: Row = field(default_factory=dict)
    config_text: str = ""
    config: Row = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)

    @property
    def before(self) -> Row:
        """The evaluation before training, empty where there is none."""
        return _mapping(self.evaluation.get("before"))

    @property
    def after(self) -> Row:
        """The evaluation after training, empty where there is none."""
        return _mapping(self.evaluation.get("after"))

    @property
    def best_step(self) -> int | None:
        """The step whose adapter was kept."""
        stored = self.evaluation.get("best_step")
        if isinstance(stored, int):
            return stored
        best = [row["step"] for row in self.validations if row.get("best")]
        return best[-1] if best else None

    @property
    def stop(self) -> Row | None:
        """The event with which the guard ended training, if it did; not one after which a resumed run went on."""
        last = self.steps[-1]["step"] if self.steps else 0
        return next(
            (row for row in reversed(self.events) if row.get("event") == "guard_stop" and row["step"] >= last), None
        )

    @property
    def status(self) -> tuple[str, str]:
        """One word and the reason: ``finished``, ``stopped``, ``interrupted``, ``failed`` or ``unfinished``."""
        last = self.events[-1] if self.events else {}
        reason = str(last.get("reason", ""))
        match last.get("event"):
            case "finished":
                return ("stopped" if self.stop else "finished"), reason
            case "guard_stop":
                return "stopped", reason
            case "interrupted":
                return "interrupted", reason
            case "not_finite":
                return "failed", reason
        return "unfinished", "the log has no end: the run goes on, or was killed"

    def setting(self, *names: str) -> object:
        """A value of the configuration by its path, None where it is missing."""
        value: object = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. A folder that holds no part of a run is a ``UserError``."""
    run = RunFolder(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    if not any(path.is_file() for path in (run.metrics, run.evaluation, run.config, folder / SUMMARY)):
        raise UserError(f"{folder}: holds no metrics.jsonl, evaluation.json or config.yaml; give the folder of a run")
    record = RunRecord(folder, folder.resolve().name)
    for row in _metric_rows(run.metrics):
        {"step": record.steps, "validation": record.validations, "event": record.events}.get(row["type"], []).append(
            row
        )
    if run.evaluation.is_file():
        record.evaluation, problem = json_mapping(run.evaluation)
        record.unreadable += [f"{problem}; repbend-fast eval makes it again"] if problem else []
    record.evals, problems = read_evals(folder)
    record.unreadable += problems
    if run.config.is_file():
        record.config_text = run.config.read_text(encoding="utf-8", errors="replace")
        record.config = _yaml_mapping(record.config_text)
    return record


def _metric_rows(path: Path) -> list[Row]:
    """Rows with a type and a step. A run that was killed leaves a torn last line, which is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("type"), str):
            rows.append(row)
    return rows


def _yaml_mapping(text: str) -> Row:
    try:
        return _mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        return {}


def _mapping(value: object) -> Row:
    return value if isinstance(value, dict) else {}
