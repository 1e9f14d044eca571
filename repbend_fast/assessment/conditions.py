"""``settings.json`` of an evaluation's folder: what its answers depend on. An evaluation goes on with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from repbend_fast.assessment.suites import Suite
from repbend_fast.assessment.target import Subject, fingerprint
from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import write_json

FORMAT = 1
SETTINGS = "settings.json"
FREE = ("attacks", "judges", "batch_size")
"""What may differ when an evaluation goes on: answers do not depend on it."""


def settings_of(
    subject: Subject, suites: Sequence[Suite], tokens: Sequence[int], **others: object
) -> dict[str, object]:
    """Everything that decides an answer, in plain values. ``tokens``: each suite's answer budget."""
    return {
        "format": FORMAT,
        "target": subject.name,
        "adapter": subject.adapter,
        "adapter_sha256": fingerprint(subject.adapter) if subject.adapter else None,
        "model": subject.config.model.model_dump(mode="json"),
        **others,
        "chat_template_kwargs": subject.config.data.chat_template_kwargs,
        "suites": {
            suite.name: {"prompts": len(suite.prompts), "sha256": digest(suite), "max_new_tokens": budget}
            for suite, budget in zip(suites, tokens, strict=True)
        },
    }


def digest(suite: Suite) -> str:
    """SHA-256 over all that a suite's prompts hold."""
    content = [
        [p.kind, p.text, p.item, p.target, p.answer, [m.content for m in p.messages or ()], *_tools_of(p)]
        for p in suite.prompts
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _tools_of(prompt: Prompt) -> list[str]:
    """What a prompt with tools has besides; plain ones have no more than they had before there were tools."""
    found = [prompt.tools, *(turn.extra for turn in prompt.messages or ())]
    return found if any(found) else []


def go_on(path: Path, wanted: dict[str, object]) -> dict[str, object]:
    """Write ``wanted``, or see that the folder's answers were given under the same; more suites and settings may come
    in. Returns all that the file holds then.

    Raises:
        UserError: a setting differs, or the file is none of ours. It names the setting and both values.
    """
    if path.is_file():
        stored = read_settings(path, wanted, "another --out")
        suites = [cast(dict[str, object], each.get("suites", {})) for each in (stored, wanted)]
        wanted = stored | wanted | {"suites": suites[0] | suites[1]}
    write_json(path, wanted)
    return wanted


def read_settings(path: Path, wanted: dict[str, object], remedy: str) -> dict[str, object]:
    """What the file holds, which agrees with ``wanted`` in all that both have.

    Raises:
        UserError: as :func:`go_on`; ``remedy`` is what to give instead.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the settings of an evaluation; give {remedy}") from error
    for key, old, new in _differences(stored, wanted):
        raise UserError(
            f"{path.parent}: was begun with {key}={_brief(old)}, now it is {_brief(new)}; give the same, or {remedy}"
        )
    return cast(dict[str, object], stored)


def _differences(stored: object, wanted: dict[str, object]) -> Iterator[tuple[str, object, object]]:
    """Settings that both have, by their whole name, with the value of each."""
    if not isinstance(stored, dict) or not isinstance(stored.get("suites"), dict):
        yield "format", None, FORMAT
        return
    for key, new in wanted.items():
        if key in stored and key not in FREE:
            yield from _differing(key, stored[key], new)


def _differing(name: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if key in old:
                yield from _differing(f"{name}.{key}", old[key], new[key])
    elif old != new:
        yield name, old, new


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
