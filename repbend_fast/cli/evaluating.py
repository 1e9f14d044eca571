"""``eval`` with suites, attacks and judges."""

from __future__ import annotations

from argparse import Namespace

from repbend_fast import api
from repbend_fast.cli.output import listener, print_json
from repbend_fast.config.overrides import parse_overrides
from repbend_fast.errors import UserError
from repbend_fast.nearby import names_model

COUNTS = {"limit": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}
"""The evaluation's own settings among the overrides, and the least that each may be."""

OF_MODEL = {"dtype": "model.dtype", "quantization": "model.quantization"}
"""Settings that would otherwise have to name their section: the adapter of a recipe has a dtype too."""


def is_assessment(arguments: Namespace) -> bool:
    """Whether a suite, an attack, a judge, an adapter or another evaluation is named, or the target is a model: else
    ``eval`` measures a run or a recipe by its own ``evaluation`` settings, into ``evaluation.json``.
    """
    if arguments.suite or arguments.attack or arguments.judge or arguments.adapter or arguments.base_of:
        return True
    return names_model(arguments.target)


def assess(arguments: Namespace) -> int:
    """Run the evaluation, or go on with it."""
    own, chat, others = _own_settings(arguments.overrides)
    found = api.assess(
        arguments.target,
        others,
        overlays=arguments.overlays,
        adapter=arguments.adapter,
        suites=arguments.suite,
        attacks=arguments.attack,
        judges=arguments.judge,
        out=arguments.out,
        base_of=arguments.base_of,
        **({} if chat is None else {"chat": chat}),
        say=listener(arguments),
        limit=own.get("limit"),
        max_new_tokens=own.get("max_new_tokens"),
        batch_size=own.get("batch_size", api.BATCH_SIZE),
        seed=own.get("seed", 0),
    )
    if arguments.json:
        print_json(found.summary)
    return 0


def _own_settings(words: list[str]) -> tuple[dict[str, int], str | None, list[str]]:
    """The evaluation's own counts, its conversations, and the words of the others."""
    own: dict[str, int] = {}
    chat: str | None = None
    others: list[str] = []
    for override in parse_overrides(words):
        if override.name == "chat":
            chat = override.text
            continue
        least = COUNTS.get(override.name)
        if least is None:
            others.append(f"{OF_MODEL.get(override.name, override.spelled)}={override.text}")
            continue
        if type(override.value) is not int or override.value < least:
            raise UserError(f"{override.spelled}={override.text}: give a whole number from {least} on")
        own[override.name] = override.value
    return own, chat, others
