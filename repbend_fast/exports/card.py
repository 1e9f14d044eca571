"""The model card of an export: where it comes from, how it was made, what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from repbend_fast.config import Config
from repbend_fast.exports.check_export import Check
from repbend_fast.nearby import own_path
from repbend_fast.runs.folder import RunFolder

_RATES = {
    "attack_direct": "attack success, asked directly",
    "attack_prefill": "attack success, answer begun for it",
    "refusal_ordinary": "refusals of ordinary questions",
    "helpful": "ordinary questions answered rightly",
    "kl": "KL to the base, nats per token",
    "perplexity": "perplexity on ordinary conversations",
}
_SHOWN = ("training", "lora", "objective")


def write_card(folder: Path, config: Config, run: RunFolder, kind: str, check: Check | None) -> None:
    """Write ``README.md`` into ``folder``, in the form that the hub reads. A base from a folder is named by that
    folder's last name alone.
    """
    (folder / "README.md").write_text(card(config, run, kind, check), encoding="utf-8")


def card(config: Config, run: RunFolder, kind: str, check: Check | None) -> str:
    """The card's text."""
    base = config.model.name
    local = own_path(base).is_dir() or base.startswith("package:")
    name = Path(base.removeprefix("package:")).name if local else base
    lines = ["---"]
    lines += [] if local else [f"base_model: {json.dumps(base)}"]
    lines += [f"library_name: {'peft' if kind == 'adapter' else 'transformers' if kind == 'merged' else 'gguf'}"]
    lines += ["pipeline_tag: text-generation", "tags: [repbend-fast, safety]", "---", "", f"# {name}, bent", ""]
    lines += [f"`{name}` after safety training with repbend-fast, method `{config.objective.name}`. {_KINDS[kind]}", ""]
    lines += ["## Data", "", *_data(config), "", "## Settings", "", *_settings(config), "", "## Evaluation", ""]
    lines += [*_evaluation(run), ""]
    if check is not None:
        lines += ["## This export beside the trained model", "", f"Measured on {check.what}.", "", "```"]
        lines += [*(row.line() for row in check.rows), "```", ""]
        lines += [f"- {warning}" for warning in check.warnings]
    return "\n".join(lines).rstrip() + "\n"


_KINDS = {
    "adapter": "This is the LoRA adapter in PEFT format, to be put on the base.",
    "merged": "The adapter is merged into the weights.",
    "gguf": "The adapter is merged into the weights, as a GGUF file.",
}


def _data(config: Config) -> Iterator[str]:
    for source in config.data.sources:
        path = source.path
        shown = path if "/" not in path or (path.count("/") == 1 and not Path(path).exists()) else Path(path).name
        roles = f", roles {', '.join(source.roles)}" if source.roles else ""
        yield f"- `{shown}`{roles}{f', at most {source.limit} of each role' if source.limit else ''}"


def _settings(config: Config) -> Iterator[str]:
    yield "| setting | value |"
    yield "| --- | --- |"
    yield f"| `model.dtype` | `{config.model.dtype}` |"
    yield f"| `model.quantization` | `{config.model.quantization}` |"
    for section in _SHOWN:
        for key, value in getattr(config, section).model_dump(mode="json", exclude_none=True).items():
            if not isinstance(value, dict):
                yield f"| `{section}.{key}` | `{json.dumps(value)}` |"


def _evaluation(run: RunFolder) -> list[str]:
    found = _read(run.evaluation)
    before, after = found.get("before"), found.get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return ["The run measured nothing before and after (`evaluation.prompts`)."]
    rows = [
        f"| {title} | {_number(before.get(key))} | {_number(after.get(key))} |"
        for key, title in _RATES.items()
        if isinstance(after.get(key), int | float)
    ]
    return ["| | before | after |", "| --- | --- | --- |", *rows]


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
