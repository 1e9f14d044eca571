"""Answers by several processes: the first decides what is asked, and each generates a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from repbend_fast.data.prompts import Prompt
from repbend_fast.distributed.ranks import Ranks
from repbend_fast.evaluation.generate import Answer
from repbend_fast.making.answering import Generator


@contextmanager
def asking(ranks: Ranks, generate: Generator) -> Iterator[Generator]:
    """``generate`` for the first of ``ranks``, with which the others :func:`take_part` until the block ends."""

    def together(prompts: Sequence[Prompt], starts: Sequence[str]) -> list[Answer]:
        ranks.same((prompts, starts))
        return generate(prompts, starts)

    yield together
    ranks.same(None)


def take_part(ranks: Ranks, generate: Generator) -> None:
    """Generate what the first of ``ranks`` asks for until it has no more to ask."""
    while (asked := ranks.same(None)) is not None:
        generate(*asked)
