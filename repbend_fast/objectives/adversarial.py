"""Adversarial training in latent space: perturbed copies of a method's streams, and what the perturbation is to do.

A copy has the terms of its stream under ``perturbed_…`` names, adapted and reference pass being perturbed alike, so
that at LoRA's start distances are 0 there too. What is bent is perturbed towards its unsafe answer; a refusal is
perturbed away from its safe answer and towards the unsafe one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.errors import UserError
from repbend_fast.objectives.choices import Auto
from repbend_fast.objectives.perturbed import Search
from repbend_fast.objectives.rows import NOTHING, count, forget_sequences, predicting_rows, refused_pairs
from repbend_fast.objectives.sections import Aim, MethodConfig, at_share
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import AnswerLoss, Span, Term, Unit, Unlikelihood
from repbend_fast.section import AboveZero, NonNegative, Positive, Section, Weight

PREFIX = "perturbed_"
"""Of the names of perturbed streams and of their terms."""
PUBLISHED_STATES = (0, 8, 16, 24, 30)
PUBLISHED_RADIUS, REFERENCE_RADIUS = 6.0, 0.5
HALF = 0.5


class SearchConfig(Section):
    """How perturbations are searched."""

    states: Annotated[list[NonNegative], Field(min_length=1)] | Auto = Field(
        "auto",
        description="Hidden states whose prompt rows are perturbed, 0 the embedding's output; auto = as deep as 0, 8, "
        "16, 24 and 30 of 32 blocks.",
    )
    radius: AboveZero | None = Field(
        None,
        description="Largest length of a row's perturbation, in distance_unit; none = 6 (published), or 0.5 in units "
        "of the reference.",
    )
    search_steps: Positive = Field(16, description="Projected gradient steps of a search.")
    step_size: AboveZero | None = Field(
        None,
        description="Size of a step per coordinate, in distance_unit; none = an eighth of the radius in length. "
        "Published: 1e-3 for Llama-3, 5e-2 for Llama-2.",
    )

    def states_of(self, num_blocks: int) -> tuple[int, ...]:
        """The hidden states for a model with ``num_blocks`` blocks.

        Raises:
            UserError: it has no such states, or only reads them behind its norm.
        """
        if isinstance(self.states, str):
            shares = (0 if state == 0 else at_share(state, num_blocks) for state in PUBLISHED_STATES)
            return tuple(sorted({min(state, num_blocks - 1) for state in shares}))
        if max(self.states) >= num_blocks:
            raise UserError(
                f"objective: states={self.states}: hidden states of this model that can be perturbed are 0 … "
                f"{num_blocks - 1}"
            )
        return tuple(sorted(set(self.states)))

    def search(
        self,
        num_blocks: int,
        unit: Unit,
        sequences: tuple[Sequence, ...],
        terms: tuple[Term, ...],
        prompts: tuple[int, ...],
        shared: tuple[int | None, ...],
        spans: tuple[Span, ...],
    ) -> Search:
        """The search with these settings; the others are those of :class:`Search`."""
        radius = self.radius or (REFERENCE_RADIUS if unit == "reference" else PUBLISHED_RADIUS)
        states, steps = self.states_of(num_blocks), self.search_steps
        return Search(sequences, terms, prompts, shared, spans, states, radius, steps, self.step_size, unit)


class AdversarialConfig(SearchConfig):
    """Perturbed copies of the streams of what is bent and of what is refused."""

    weight: Weight = Field(
        0.0, description="Weight of the perturbed copies, as a multiple of their terms' own; 0 = there are none."
    )


class AttackedConfig(MethodConfig):
    """Settings of a method whose streams can have perturbed copies."""

    adversarial: AdversarialConfig = Field(
        default_factory=AdversarialConfig, description="Latent adversarial training beside the method's own streams."
    )

    @property
    def kind(self) -> Aim:
        return "adversarial" if self.adversarial.weight else super().kind

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        mode = getattr(self, "loss_mode", "")
        if self.adversarial.weight and mode in ("prompt_last", "prompt_all"):
            yield (
                f"objective.adversarial.weight={self.adversarial.weight:g} perturbs prompts towards their answers, and "
                f"objective.loss_mode={mode} reads none; set loss_mode=response_all, or the weight to 0"
            )


def with_copies(*names: str, of: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a method's streams, and of those that are perturbed copies: ``of`` these, and of the refusal."""
    return (*names, *(PREFIX + name for name in (*of, "refusal")))


def with_perturbed(
    config: AttackedConfig, streams: list[Stream], names: Iterable[str], batch: Batch, num_blocks: int
) -> list[Stream]:
    """``streams``, and the perturbed copies of those ``names`` where they have a weight."""
    if not config.adversarial.weight:
        return streams
    bent = frozenset(forget_sequences(batch))
    copies = []
    for stream in streams:
        if stream.name == "refusal":
            copies.append(_perturbed(config, stream, _refusing(config, stream, batch, num_blocks)))
        elif stream.name in names:
            copies.append(_perturbed(config, stream, _bending(config, stream, bent, num_blocks)))
    return [*streams, *copies]


def away_and_towards(sequences: tuple[Sequence, ...], avoided: int) -> tuple[Term, Term]:
    """½ mean −log(1 − p) over the answers of the first ``avoided`` sequences, ½ mean −log p over the others'."""
    spans = predicting_rows(sequences)
    first = (*spans[:avoided], *(NOTHING for _ in spans[avoided:]))
    others = (*(NOTHING for _ in spans[:avoided]), *spans[avoided:])
    away = Unlikelihood("away", first, HALF, count(first))
    return away, AnswerLoss("towards", others, HALF, count(others))


def prompt_rows(sequences: Iterable[Sequence]) -> tuple[Span, ...]:
    """All rows of the prompts, the first row of a sequence without one."""
    return tuple((0, max(1, s.prompt_length)) for s in sequences)


def _bending(config: AttackedConfig, stream: Stream, bent: frozenset[Sequence], num_blocks: int) -> Search:
    """Towards the answers of the sequences that are ``bent``."""
    sequences = tuple(s for s in stream.sequences if s in bent)
    spans = predicting_rows(sequences)
    numbers = iter(range(len(sequences)))
    shared = tuple(next(numbers) if s in bent else None for s in stream.sequences)
    terms = (AnswerLoss("towards", spans, 1.0, count(spans)),)
    prompts = tuple(range(len(sequences)))
    return config.adversarial.search(
        num_blocks, _unit(config), sequences, terms, prompts, shared, prompt_rows(sequences)
    )


def _refusing(config: AttackedConfig, stream: Stream, batch: Batch, num_blocks: int) -> Search:
    """Away from the safe answers of pairs, and towards their unsafe ones behind the same prompts."""
    unsafe = tuple(pair.unsafe for pair in refused_pairs(batch))
    both, numbers = (*stream.sequences, *unsafe), tuple(range(len(unsafe)))
    terms = away_and_towards(both, len(unsafe))
    spans = prompt_rows(unsafe)
    return config.adversarial.search(num_blocks, _unit(config), both, terms, numbers * 2, numbers, spans)


def _perturbed(config: AttackedConfig, stream: Stream, search: Search) -> Stream:
    terms = tuple(term.named(PREFIX, config.adversarial.weight) for term in stream.terms)
    return Stream(PREFIX + stream.name, stream.sequences, terms, search)


def _unit(config: MethodConfig) -> Unit:
    return "reference" if config.counts_in_reference else "state"
