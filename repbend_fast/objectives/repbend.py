"""Representation Bending (Yousefpour et al., ACL 2025, arXiv 2504.01550).

    L = α·S − β·U + γ·C + ε·K (+ η·P + ρ·F)

S, U: mean l2 distance to the reference over rows × layers of the safe and the unsafe stream. C: mean pairwise 1 − cos
of the last prompt tokens of the unsafe stream. K: T²-scaled KL on the retain stream. P: unsafe answers against the safe
reference. F: ``objectives.refusal``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.adversarial import AttackedConfig, with_perturbed
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import NOTHING, forget_sequences, kl_stream, safe_sequences, select_rows
from repbend_fast.objectives.sections import KL_TERM, TITLES, Entry, Quirks, RefusalConfig, WindowConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Distance, PairwiseCosine, Span, Term, rows_in
from repbend_fast.section import AboveZero, Positive, Weight

PUBLISHED_WEIGHTS = {"alpha": "safe", "beta": "unsafe", "gamma": "cosine", "epsilon": "kl"}
"""The weights' names in the publication, and here."""


def _published_mode(value: object) -> Any:
    return (
        "prompt_" + value.removeprefix("request_") if isinstance(value, str) and value.startswith("request_") else value
    )


PROMPT_MODES = ("prompt_last", "prompt_all")
"""The loss modes that read no answers."""
# The published code says `request_…` where its README says `prompt_…`.
LossMode = Annotated[
    Literal["prompt_last", "prompt_all", "prompt_response", "response_all", "assistant_turns"],
    BeforeValidator(_published_mode),
]


class RepBendConfig(AttackedConfig, RefusalConfig, WindowConfig):
    """RepBend: L = safe·S − unsafe·U + cosine·C + kl·K (+ pair·P + refusal·F), all weights ≥ 0."""

    place: ClassVar[int] = 1
    stream_names: ClassVar[tuple[str, ...]] = (
        *("safe", "unsafe", "retain", "refusal"),
        *("perturbed_unsafe", "perturbed_refusal"),
    )
    titles: ClassVar[dict[str, str]] = {
        "safe": "safe: distance kept small",
        "unsafe": "unsafe: distance made large",
        "cosine": "cosine: unsafe states alike",
        KL_TERM: TITLES[KL_TERM],
        "pair": "pair: unsafe to safe",
        "refusal": TITLES["refusal"],
    }
    layers_title: ClassVar[str] = "mean distance to the reference"

    name: Literal["repbend"] = "repbend"
    safe: Weight = Field(0.5, description="Weight of the distance of safe states, which are to stay.")
    unsafe: Weight = Field(0.5, description="Weight of the distance of unsafe states, which are to go.")
    cosine: Weight = Field(0.1, description="Weight of the pairwise cosine distance of unsafe sequences.")
    kl: Weight = Field(0.3, description="Weight of the KL on retain conversations.")
    pair: Weight = Field(0.0, description="Weight of the pair term.")
    unsafe_limit: AboveZero | None = Field(
        None,
        description="A row's unsafe distance counts up to this multiple of its reference's norm; none = no bound, as "
        "published.",
    )
    loss_mode: LossMode = Field("response_all", description="Which tokens' states count.")
    pair_positions: Positive = Field(20, description="Tokens of each half that the pair term reads.")
    published_quirks: Quirks = False

    @property
    def needs_pairs(self) -> bool:
        return self.pair > 0 or super().needs_pairs

    @property
    def replaceable(self) -> frozenset[str]:
        # Where prompts alone count, the safe ones are those of safe records: a pair's asks for something unsafe.
        return frozenset({"unsafe"}) if self.loss_mode in PROMPT_MODES else super().replaceable

    @property
    def compares_unsafe(self) -> bool:
        return self.cosine > 0

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.cosine == 0 and self.pair == 0 and self.refusal == 0:
            yield (
                "objective.cosine=0 with objective.pair=0: the other terms have no gradient while LoRA is at its "
                "start, so nothing would "
                "ever train; give one of the two, or objective.refusal, a weight above 0"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        roles: list[Role] = []
        if self.safe:
            roles += ["safe"] if self.loss_mode in PROMPT_MODES else ["safe", "pair"]
        if self.unsafe or self.cosine or self.pair:
            bending: list[Role] = ["unsafe", "pair"]
            roles += [role for role in bending if role not in roles]
        if self.kl:
            roles.append("retain")
        return self.with_pairs(tuple(roles))

    @classmethod
    def recorded(cls, case: Entry, expected: Entry) -> RepBendConfig:
        """See :class:`MethodConfig`."""
        window = expected["window"]
        if window != list(range(window[0], window[0] + len(window))):
            raise ValueError(f"window {window} is not a run of consecutive hidden states")
        weights: dict[str, Any] = {ours: float(case[theirs]) for theirs, ours in PUBLISHED_WEIGHTS.items()}
        return cls(
            **weights,
            window_start=window[0],
            window_size=len(window),
            loss_mode=_published_mode(case["loss_mode"]),
            alpha_mode=case["alpha_mode"],
            published_quirks=True,
        )


@method(RepBendConfig)
class RepBend:
    """RepBend's streams for one model. ``num_blocks`` decoder blocks give hidden states 0 … num_blocks."""

    def __init__(self, config: RepBendConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps  # the weights are constant
        config = config.within(num_blocks)
        self.config = config
        self.num_blocks = num_blocks
        self.roles = config.roles
        self.seed = seed
        self.uses_head = config.kl > 0 or config.refusal > 0 or config.adversarial.weight > 0
        self.last_state = max(config.window)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        candidates = (self._safe(batch), self._unsafe(batch), self._retain(batch))
        streams = [*(s for s in candidates if s is not None), *refusal_streams(self.config, batch, step, self.seed)]
        return with_perturbed(self.config, streams, ("unsafe",), batch, self.num_blocks)

    def probes(self, batch: Batch) -> Probes:
        # What moves is of interest where its own term has no weight as well.
        weights = {"safe": self.config.safe or 1.0, "unsafe": self.config.unsafe or 1.0}
        every = RepBend(self.config.model_copy(update=weights), self.num_blocks)
        found = (every._unsafe(batch), every._safe(batch))
        bent, kept = (replace(s, terms=s.terms[:1]) if s is not None and s.sequences else None for s in found)
        return Probes(bent, kept)

    def _safe(self, batch: Batch) -> Stream | None:
        config = self.config
        if not config.safe:
            return None
        if config.loss_mode in PROMPT_MODES:
            sequences = tuple(s.prompt for s in batch.safe)
        else:
            sequences = safe_sequences(batch)
        # The embedding's distance is zero and has no gradient; it is counted in the denominator and not read.
        every = config.alpha_mode == "all"
        layers = tuple(range(1, self.num_blocks + 1)) if every else config.window
        return Stream("safe", sequences, (self._distance("safe", sequences, layers, config.safe, len(layers) + every),))

    def _unsafe(self, batch: Batch) -> Stream | None:
        config = self.config
        sequences = forget_sequences(batch)
        if config.loss_mode in PROMPT_MODES and not config.pair:  # the pair term reads the answers in every mode
            sequences = tuple(s.prompt for s in sequences)
        terms: list[Term] = []
        if config.unsafe:
            # A slip of the published code: with prompt_last its row mask is filled for the first B sequences only.
            read = (
                len(batch.unsafe) if config.published_quirks and config.loss_mode == "prompt_last" else len(sequences)
            )
            distance = self._distance("unsafe", sequences, config.window, -config.unsafe, len(config.window), read)
            terms.append(replace(distance, limit=config.unsafe_limit))
        if config.pair:
            terms.append(self._pair(batch))
        if config.cosine and len(sequences) > 1:
            positions = tuple(s.prompt_length - 1 for s in sequences)
            terms.append(PairwiseCosine("cosine", config.window, positions, config.cosine))
        return Stream("unsafe", sequences, tuple(terms)) if terms else None

    def _retain(self, batch: Batch) -> Stream | None:
        return kl_stream(self.config, batch.retain) if self.config.kl else None

    def _distance(
        self,
        name: str,
        sequences: tuple[Sequence, ...],
        layers: tuple[int, ...],
        weight: float,
        counted: int,
        read: int | None = None,
    ) -> Distance:
        spans = tuple(
            select_rows(s, self.config.loss_mode) if read is None or i < read else NOTHING
            for i, s in enumerate(sequences)
        )
        # Hidden state 0 may lie in a user's window; its distance is zero as well.
        denominator = max(1, rows_in(spans) * counted)
        return Distance(
            name, tuple(x for x in layers if x > 0), spans, weight, denominator, unit=self.config.distance_unit
        )

    def _pair(self, batch: Batch) -> Distance:
        config = self.config
        spans: list[Span] = [NOTHING] * len(batch.unsafe)
        against: list[Sequence | None] = [None] * len(batch.unsafe)
        for pair in batch.pairs:
            first = pair.unsafe.prompt_length - 1
            shared = min(len(pair.unsafe), len(pair.safe)) - first
            spans.append((first, first + min(config.pair_positions, shared)))
            against.append(pair.safe)
        denominator = max(1, rows_in(spans) * len(config.window))
        return Distance(
            "pair",
            config.window,
            tuple(spans),
            config.pair,
            denominator,
            against=tuple(against),
            unit=config.distance_unit,
        )
