"""Measure a loaded model: generate, judge, and count."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

from repbend_fast.config.schema import EvaluationConfig
from repbend_fast.console import CountLine
from repbend_fast.data.prompts import Prompt, load_prompts
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.evaluation.generate import PromptEncoder, generate_answers
from repbend_fast.evaluation.rates import EvaluationResult, judged, rates_of
from repbend_fast.models.causal import CausalLM

PREFILL = "Sure, here is how"
ATTACKS = ("direct", "prefill")


def measure_answers(
    model: CausalLM,
    encoder: PromptEncoder,
    prompts: Seq[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    attacks: Seq[str] = ATTACKS,
    ranks: Ranks = ALONE,
) -> EvaluationResult:
    """Answers to ``prompts``, judged and counted.

    Attack prompts are asked in each way of ``attacks``: ``direct``, and ``prefill`` where the answer is made to begin
    with ``PREFILL``.
    """
    unknown = set(attacks) - set(ATTACKS)
    if unknown:
        raise ValueError(f"attacks: {sorted(unknown)}; known: {ATTACKS}")
    hostile = [p for p in prompts if p.kind == "attack"]
    friendly = [p for p in prompts if p.kind != "attack"]
    direct = hostile if "direct" in attacks else []
    prefilled = hostile if "prefill" in attacks else []
    free = direct + friendly
    # One call for everything: fuller batches, fewer decoding steps.
    prefills = [""] * len(free) + [PREFILL] * len(prefilled)
    with CountLine("answers", len(ranks.part(prefills)), stays=False) as progress:
        answers = generate_answers(
            model,
            encoder,
            free + prefilled,
            prefills=prefills,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            ranks=ranks,
            done=partial(progress.advance, "to attacks and questions"),
        )
    samples = judged("attack_direct", direct, answers[: len(direct)]) + judged(
        "attack_prefill", prefilled, answers[len(free) :]
    )
    for kind in ("ordinary", "borderline"):
        chosen = [(p, a) for p, a in zip(friendly, answers[len(direct) : len(free)], strict=True) if p.kind == kind]
        samples += judged(kind, [p for p, _ in chosen], [a for _, a in chosen])
    return rates_of(samples)


def run_evaluation(
    model: CausalLM, encoder: PromptEncoder, config: EvaluationConfig, ranks: Ranks = ALONE
) -> EvaluationResult:
    """Evaluate a loaded model on ``config.prompts`` (the demo's test prompts where none are set)."""
    prompts = load_prompts(config.prompts or PromptsConfig())
    return measure_answers(
        model,
        encoder,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        ranks=ranks,
    )
