"""The sets of prompts that a model is asked, by name, as files, or from the hub."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from repbend_fast.data.demo.world import APART
from repbend_fast.data.prompts import SETS, Prompt, limit_per_kind, load_prompts
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.errors import UserError
from repbend_fast.nearby import is_hub_name, looks_like_file, nearest, own_path

PUBLISHED_TOKENS = 512
"""A published set's answer budget: refusals can come late, and judges were trained on answers of this length."""
DEMO_TOKENS = 64


@dataclass(frozen=True)
class Suite:
    """Prompts with the name that records have for them, and how long an answer may be where nothing is said."""

    name: str
    prompts: tuple[Prompt, ...]
    max_new_tokens: int = PUBLISHED_TOKENS


@dataclass(frozen=True)
class Place:
    """Where a published set lies on the hub: its name, and subset and split of each part."""

    path: str
    parts: tuple[tuple[str | None, str | None], ...] = ((None, None),)


PLACES = {
    "harmbench": Place("walledai/HarmBench", (("standard", None), ("contextual", None))),
    "advbench": Place("walledai/AdvBench"),
    "jailbreakbench": Place("JailbreakBench/JBB-Behaviors", (("behaviors", "harmful"),)),
    "jailbreakbench-benign": Place("JailbreakBench/JBB-Behaviors", (("behaviors", "benign"),)),
    "strongreject": Place("walledai/StrongREJECT"),
    "xstest": Place("Paul/XSTest"),
    "wildjailbreak": Place("allenai/wildjailbreak", (("eval", "train"),)),
    "or-bench": Place("bench-llm/or-bench", (("or-bench-hard-1k", None),)),
    "or-bench-toxic": Place("bench-llm/or-bench", (("or-bench-toxic", None),)),
}
DEMOS = {"demo": "test", **{f"demo-{split}": split for split in ("validation", *APART)}}


def suite_names() -> list[str]:
    """The names that :func:`load_suite` knows."""
    return [*DEMOS, *PLACES]


def load_suite(text: str, limit: int | None = None) -> Suite:
    """``NAME`` from the hub (the demo's is bundled), ``FILE``, ``owner/name`` on the hub, or ``NAME:FILE`` for a file
    that is to be read as a published set; ``limit`` takes that many prompts of each kind, spread
    evenly, of different items as far as there are.

    Raises:
        UserError: an unknown name, no such file, a missing column or a bad row, each by name, file and line.
    """
    name, colon, file = text.partition(":")
    if colon and name in SETS:
        return Suite(name, _prompts(file, limit, of_set=name))
    if text in DEMOS:
        prompts = load_prompts(PromptsConfig(path="demo", split=DEMOS[text], limit=limit))
        return Suite(text, tuple(prompts), DEMO_TOKENS)
    if text in PLACES:
        return Suite(text, _published(text, limit))
    path = own_path(text)
    if path.exists() or is_hub_name(text):
        return Suite(text if not path.exists() else _stem(path), _prompts(text, limit))
    near = difflib.get_close_matches(text, suite_names(), 1)
    hint = f"; did you mean {near[0]}?" if near else nearest(text)
    what = "no such file" if looks_like_file(text) or "/" in text else "neither a suite nor a file"
    raise UserError(f"--suite {text}: {what}; suites are {', '.join(suite_names())}{hint}")


def _prompts(file: str, limit: int | None, of_set: str | None = None) -> tuple[Prompt, ...]:
    if not own_path(file).exists() and not is_hub_name(file):
        raise UserError(f"--suite {file}: no such file{nearest(file)}")
    return tuple(load_prompts(PromptsConfig(path=file, limit=limit), of_set=of_set))


def _published(name: str, limit: int | None) -> tuple[Prompt, ...]:
    place = PLACES[name]
    found: list[Prompt] = []
    for subset, split in place.parts:
        found += load_prompts(PromptsConfig(path=place.path, split=split), of_set=name, subset=subset)
    return tuple(limit_per_kind(found, limit))


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return Path(name).stem if path.is_file() else name


def different_names(suites: list[Suite]) -> list[Suite]:
    """The suites with a number behind a name that an earlier one has: records know them by name."""
    found: list[Suite] = []
    for suite in suites:
        taken = {other.name for other in found}
        numbered = (f"{suite.name}-{number}" for number in range(2, len(suites) + 2))
        name = suite.name if suite.name not in taken else next(n for n in numbered if n not in taken)
        found.append(Suite(name, suite.prompts, suite.max_new_tokens))
    return found
