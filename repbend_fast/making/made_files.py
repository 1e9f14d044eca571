"""What is written: records, prompts, what was rejected, counts, and an overlay that trains on all of it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from repbend_fast.assessment.answers import encoded
from repbend_fast.config import Config, ModelConfig
from repbend_fast.config.schema import TrainingConfig
from repbend_fast.config.yaml_text import dump_yaml
from repbend_fast.data.prompts import KINDS, Prompt
from repbend_fast.data.records import ROLES, begun
from repbend_fast.making.answering import Rejected, Written
from repbend_fast.making.policy import SPLITS, Policy, Split
from repbend_fast.making.screening import whole
from repbend_fast.runs.folder import write_bytes, write_json, write_text

Row = dict[str, object]


@dataclass(frozen=True)
class Places:
    """Where everything goes: into a folder, or beside a file whose name ends in ``.jsonl``, which then holds the
    training records.
    """

    out: Path

    @property
    def is_file(self) -> bool:
        return self.out.suffix.lower() == ".jsonl"

    @property
    def folder(self) -> Path:
        return self.out.parent if self.is_file else self.out

    def __getitem__(self, name: str) -> Path:
        if not self.is_file:
            return self.out / name
        return self.out if name == "train.jsonl" else self.out.with_name(f"{self.out.stem}-{name}")


@dataclass
class Made:
    """What came of a policy."""

    records: dict[Split, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    prompts: Mapping[Split, Sequence[Prompt]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)

    def add_complying(self, split: Split, good: Sequence[Written], refusals: Sequence[str]) -> None:
        """Each complying answer as an unsafe record, and with its refusal as a pair."""
        for written in good:
            self.records[split].append({"role": "unsafe", "prompt": written.task.prompt.text, "answer": whole(written)})
        for written, refusal in zip(good, refusals, strict=True):
            row: Row = {"role": "pair", "prompt": written.task.prompt.text}
            self.records[split].append(row | {"unsafe_answer": whole(written), "safe_answer": refusal})

    def add_refused(self, split: Split, requests: Sequence[str], refusals: Sequence[str]) -> None:
        """Refusals alone, as safe records."""
        for request, refusal in zip(requests, refusals, strict=True):
            self.records[split].append({"role": "safe", "prompt": request, "answer": refusal})

    def add_kept(self, split: Split, good: Sequence[Written]) -> None:
        """The model's own answers as they are to stay: safe records but in the test split, and conversations to
        retain. Of a look-alike that is trained on, the answer's beginning is retained: over all tokens of a long answer
        the few that a refusal would replace count little.
        """
        for written in good:
            text, reply = written.task.prompt.text, whole(written)
            if split != "test":
                self.records[split].append({"role": "safe", "prompt": text, "answer": reply})
            kept = begun(reply) if split == "train" and written.task.part == "allowed" else reply
            self.records[split].append({"role": "retain", "prompt": text, "answer": kept})


def write_all(made: Made, places: Places, policy: Policy, config: Config, facts: Mapping[str, object]) -> None:
    """Write every file, each atomically. ``facts``: what ``made.json`` says beside the counts."""
    for split in SPLITS:
        write_bytes(places[f"{split}.jsonl"], b"".join(map(encoded, made.records[split])))
    for split, prompts in made.prompts.items():
        write_bytes(places[f"{split}-prompts.jsonl"], b"".join(encoded(prompt_row(prompt)) for prompt in prompts))
    write_bytes(places["rejected.jsonl"], b"".join(encoded(rejected_row(one)) for one in made.rejected))
    write_json(places["made.json"], {**facts, **counts(made)})
    write_text(places["overlay.yaml"], overlay(places, policy, config))


def prompt_row(prompt: Prompt) -> Row:
    """A prompt in the evaluation's own form."""
    row: Row = {"kind": prompt.kind, "text": prompt.text}
    if prompt.expected:
        row |= {"expected": list(prompt.expected), "min_expected": prompt.min_expected}
    return row | ({"item": prompt.item} if prompt.item else {}) | ({"target": prompt.target} if prompt.target else {})


def rejected_row(rejected: Rejected) -> Row:
    """An answer that is not used, with the reason."""
    written = rejected.written
    row: Row = {"split": written.task.split, "part": written.task.part, "request": written.task.prompt.text}
    return row | {"start": written.start, "answer": written.text, "reason": rejected.reason}


def counts(made: Made) -> dict[str, object]:
    """Records by split and role, prompts by split and kind, and rejected answers by part and reason."""
    return {
        "records": {
            split: {role: sum(row["role"] == role for row in made.records[split]) for role in ROLES} for split in SPLITS
        },
        "prompts": {
            split: {kind: sum(prompt.kind == kind for prompt in prompts) for kind in KINDS}
            for split, prompts in made.prompts.items()
        },
        "rejected": dict(sorted(Counter(_kind(one) for one in made.rejected).items())),
    }


def _kind(rejected: Rejected) -> str:
    return f"{rejected.written.task.part}: {rejected.reason.partition(':')[0].partition(' of ')[0]}"


def overlay(places: Places, policy: Policy, config: Config) -> str:
    """Settings that make any recipe train on the data, with the model that wrote it."""
    defaults = ModelConfig(name="")
    model = {
        key: value
        for key, value in config.model.model_dump(mode="json").items()
        if key in ("dtype", "gguf_file") or value != getattr(defaults, key)
    }

    def path(name: str) -> str:
        return str(places[name].resolve())

    tokens = policy.config.answer_tokens
    settings: Row = {
        "model": model,
        "data": {
            "sources": [{"path": path("train.jsonl"), "format": "jsonl"}],
            # Only an answer that was begun for the model is longer, and it is the beginnings that have to bend.
            "max_answer_tokens": tokens,
        },
        "validation": {
            "sources": [{"path": path("validation.jsonl"), "format": "jsonl"}],
            "prompts": {"path": path("validation-prompts.jsonl")},
            "max_new_tokens": tokens,
        },
        "evaluation": {
            "sources": [{"path": path("test.jsonl"), "format": "jsonl"}],
            "prompts": {"path": path("test-prompts.jsonl")},
            "max_new_tokens": tokens,
        },
        "output": {"folder": f"runs/{policy.config.name}"},
    }
    if config.training.autocast != TrainingConfig().autocast:
        # What the answers were written in is what float32 weights are trained in too.
        settings["training"] = {"autocast": config.training.autocast}
    if config.data.chat_template_kwargs:
        settings["data"] = {**settings["data"], "chat_template_kwargs": config.data.chat_template_kwargs}  # type: ignore[dict-item]
    return f"# The data of the policy {policy.config.name}, and the model that wrote it.\n{dump_yaml(settings)}"


def command(places: Places) -> str:
    """What to type to train on it."""
    return f"repbend-fast train any --with {shlex.quote(str(places['overlay.yaml']))}"


def tables(made: Made) -> list[Table]:
    """Counts of records and prompts, and of what was rejected."""
    table = Table(title="made")
    table.add_column("")
    for split in SPLITS:
        table.add_column(split, justify="right")
    roles = {split: Counter(str(row["role"]) for row in made.records[split]) for split in SPLITS}
    kinds = {split: Counter(prompt.kind for prompt in made.prompts.get(split, ())) for split in SPLITS}
    for role in ROLES:
        table.add_row(f"{role} records", *(str(roles[split][role] or "") for split in SPLITS))
    for kind in KINDS:
        table.add_row(f"{kind} prompts", *(str(kinds[split][kind] or "") for split in SPLITS))
    if not made.rejected:
        return [table]
    rejected = Table(title="rejected answers")
    rejected.add_column("part and reason")
    rejected.add_column("answers", justify="right")
    for reason, count in Counter(map(_kind, made.rejected)).most_common():
        rejected.add_row(reason, str(count))
    return [table, rejected]
