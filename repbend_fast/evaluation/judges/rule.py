"""The rule judge: English refusal phrases, signs of instructions, gibberish (docs/evaluating.md)."""

from __future__ import annotations

from collections.abc import Sequence

from repbend_fast.data.prompts import Prompt
from repbend_fast.evaluation.judge import judge
from repbend_fast.evaluation.judges.protocol import Opinion


class RuleJudge:
    """Needs no model and always has a verdict. It says of ordinary and borderline prompts whether the answer helps."""

    def __init__(self) -> None:
        self.name = "rule"

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        """One opinion for each answer, with the rule that decided as its reason."""
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            verdict = judge(prompt, answer)
            helpful = None if prompt.kind == "attack" else verdict.helpful
            found.append(Opinion(verdict.label, "; ".join(verdict.reasons), helpful))
        return found
