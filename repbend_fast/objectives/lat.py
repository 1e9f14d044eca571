"""Targeted latent adversarial training (Sheshadri et al., arXiv 2407.15549).

    inner   δ = argmin  ½·CE(unsafe answer) + ½·mean −log(1 − p(safe answer)),    ‖δ_row‖₂ ≤ radius, rows of prompts
    outer   L = refusal·CE(safe answer | δ) + away·mean −log(1 − p(unsafe answer | δ)) + kl·K + retain_nll·NLL

over the pairs, whose two answers share the prompt's δ; all are means over answer tokens. K and the NLL are those of the
retain conversations, per token; the published runs have the one for Llama-3 and the other for Llama-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.adversarial import SearchConfig, away_and_towards, prompt_rows
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.choices import DistanceUnit
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import NOTHING, count, mean_distance, predicting_rows, retain_kl, retain_nll
from repbend_fast.objectives.sections import KL_TERM, TITLES, Aim, KLLimitConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import AnswerLoss, Term, Unlikelihood
from repbend_fast.section import AboveZero, Weight


class LATConfig(SearchConfig, KLLimitConfig):
    """LAT: L = refusal·CE(safe) − away·log(1 − p(unsafe)) under perturbation + kl·K (+ retain_nll·NLL) on retain."""

    place: ClassVar[int] = 12
    stream_names: ClassVar[tuple[str, ...]] = ("perturbed", "retain")
    titles: ClassVar[dict[str, str]] = {
        "refusal": "refusal under perturbation: NLL of the safe answers",
        "away": "unsafe answers under perturbation made unlikely",
        KL_TERM: TITLES[KL_TERM],
        "nll": "NLL on retain conversations",
    }

    aim: ClassVar[Aim] = "adversarial"

    name: Literal["lat"] = "lat"
    refusal: Weight = Field(0.5, description="Weight of the safe answers' negative log-likelihood.")
    away: Weight = Field(0.5, description="Weight of making the unsafe answers unlikely.")
    kl: Weight = Field(0.1, description="Weight of the KL on retain conversations, per token.")
    retain_nll: Weight = Field(0.0, description="Weight of the retain answers' negative log-likelihood.")
    temperature: AboveZero = Field(1.0, description="Of the KL's soft-max.")
    distance_unit: DistanceUnit = "state"

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("pair", "retain") if self.kl or self.retain_nll else ("pair",)

    @property
    def needs_pairs(self) -> bool:
        return True

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if not self.refusal and not self.away:
            yield "objective.refusal=0 with objective.away=0 leaves nothing to train against; give one a weight above 0"


@method(LATConfig)
class LAT:
    """Streams ``perturbed`` (safe halves of the pairs, then unsafe ones) and ``retain``."""

    uses_head = True

    def __init__(self, config: LATConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps, seed  # the weights are constant, and nothing is drawn
        config.states_of(num_blocks)
        self.config = config
        self.last_state = num_blocks
        self.roles = config.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        del step
        return [self._perturbed(batch), *([self._retain(batch)] if "retain" in self.roles else ())]

    def probes(self, batch: Batch) -> Probes:
        layers = (self.last_state,)
        bent = mean_distance("forget", tuple(pair.unsafe for pair in batch.pairs), layers)
        return Probes(bent, mean_distance("retain", batch.retain, layers))

    def _perturbed(self, batch: Batch) -> Stream:
        config, pairs = self.config, len(batch.pairs)
        both = (*(pair.safe for pair in batch.pairs), *(pair.unsafe for pair in batch.pairs))
        spans, numbers = predicting_rows(both), tuple(range(pairs))
        safe, unsafe = (*spans[:pairs], *[NOTHING] * pairs), (*[NOTHING] * pairs, *spans[pairs:])
        terms: list[Term] = []
        if config.refusal:
            terms.append(AnswerLoss("refusal", safe, config.refusal, count(safe)))
        if config.away:
            terms.append(Unlikelihood("away", unsafe, config.away, count(unsafe)))
        attack = away_and_towards(both, pairs)
        prompts, unit = prompt_rows(both[:pairs]), config.distance_unit
        search = config.search(self.last_state, unit, both, attack, numbers * 2, numbers * 2, prompts)
        return Stream("perturbed", both, tuple(terms), search)

    def _retain(self, batch: Batch) -> Stream:
        config, sequences = self.config, batch.retain
        spans = predicting_rows(sequences)
        terms: tuple[Term, ...] = (retain_kl(spans, config.kl, config.temperature),) if config.kl else ()
        return Stream(
            "retain", sequences, (*terms, *((retain_nll(sequences, config.retain_nll),) if config.retain_nll else ()))
        )
