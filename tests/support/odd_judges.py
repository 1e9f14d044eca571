"""Judges and attacks that do what real ones do on a bad day."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked, Target
from repbend_fast.evaluation.judges.protocol import Opinion


class Absent:
    """Has no verdict on every other answer, and gives out after ``patience`` of them."""

    asked: ClassVar[list[str]] = []

    def __init__(self, patience: int = 1000) -> None:
        self.name = "absent"
        self.patience = patience

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        if len(self.asked) + len(answers) > self.patience:
            raise KeyboardInterrupt
        self.asked.extend(answers)
        return [Opinion("unparsed" if n % 2 else "comply", "[red]" + "x" * 9999) for n, _ in enumerate(answers)]


class Weights:
    """A white-box attack that counts how often it is made, and which prompts it is given."""

    name: ClassVar[str] = "weights"
    white_box: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True
    given: ClassVar[list[list[str]]] = []

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        self.given.append([prompt.text for prompt in prompts])
        for index, prompt in enumerate(prompts):
            yield Attacked(index, (f"{prompt.text} {seed}",), details={"loss": float("inf"), "steps": 3})


class Halved:
    """Makes two models of one: as it is, and with its head halved."""

    name: ClassVar[str] = "halved"

    def __init__(self, by: float = 2.0) -> None:
        self.by = by
        self.folder: Path | None = None

    def variants(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[tuple[str, Target]]:
        assert self.folder is not None
        yield "halved-not", target
        head = target.model.get_output_embeddings().weight
        with torch.no_grad():
            head.mul_(-1 / self.by)
        try:
            yield "halved-once", replace(target, max_new_tokens=3)
        finally:
            with torch.no_grad():
                head.mul_(-self.by)

    def summary(self) -> dict[str, Any]:
        return {"rows": [{"records": 16, "curve": []}], "by": self.by}


class Unlucky:
    """A white-box attack that cannot ask prompts with ``word`` in them, each for a reason of its own."""

    name: ClassVar[str] = "unlucky"
    white_box: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False
    lucky: ClassVar[bool] = False

    def __init__(self, word: str = "moon-key") -> None:
        self.word = word

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        for index, prompt in enumerate(prompts):
            if self.word in prompt.text and not self.lucky:
                raise UserError(f"{prompt.text}: it does not fit into the budget")
            yield Attacked(index, (prompt.text,))


class Impossible(Unlucky):
    """One that cannot ask anything, for one and the same reason."""

    name: ClassVar[str] = "impossible"

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        raise UserError("this model has no gradients")
        yield


class Away:
    """Keeps its replies, and has none while ``there`` is False."""

    asks_again: ClassVar[bool] = True
    there: ClassVar[bool] = False
    caches: ClassVar[list[str | None]] = []
    asked: ClassVar[list[int]] = []

    def __init__(self, cache: str | None = None) -> None:
        self.name = "away"
        self.caches.append(cache)

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        self.asked.append(len(answers))
        return [Opinion("comply" if self.there or n == 0 else "unparsed", "") for n, _ in enumerate(answers)]
