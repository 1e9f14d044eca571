"""Representation Bending (Yousefpour et al., ACL 2025, arXiv 2504.01550).

    L = α·S − β·U + γ·C + ε·K (+ η·P + ρ·F)

S, U: mean l2 distance to the reference over rows × layers of the safe and the unsafe stream. C: mean pairwise 1 − cos
of the last prompt tokens of the unsafe stream. K: T²-scaled KL on the retain stream. P: unsafe answers against the safe
reference. F: ``objectives.refusal``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.adversarial import with_copies
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.choices import PROMPT_MODES, Quirks, RowMode, UnsafeLimit
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import forget_sequences, layered_distance, mode_rows, pair_distance, safe_sequences
from repbend_fast.objectives.sections import KL_TERM, TITLES, Entry, recorded_window
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import PairwiseCosine, Term
from repbend_fast.objectives.windowed import Windowed, WindowedConfig
from repbend_fast.section import Positive, Weight


class RepBendConfig(WindowedConfig):
    """RepBend: L = safe·S − unsafe·U + cosine·C + kl·K (+ pair·P + refusal·F), all weights ≥ 0."""

    place: ClassVar[int] = 1
    stream_names: ClassVar[tuple[str, ...]] = with_copies("safe", "unsafe", "retain", "refusal", of=("unsafe",))
    titles: ClassVar[dict[str, str]] = {
        "safe": "safe: distance kept small",
        "unsafe": "unsafe: distance made large",
        "cosine": "cosine: unsafe states alike",
        KL_TERM: TITLES[KL_TERM],
        "pair": "pair: unsafe to safe",
        "refusal": TITLES["refusal"],
    }
    layers_title: ClassVar[str] = "mean distance to the reference"
    moving: ClassVar[tuple[str, str]] = ("cosine", "pair")

    name: Literal["repbend"] = "repbend"
    safe: Weight = Field(0.5, description="Weight of the distance of safe states, which are to stay.")
    unsafe: Weight = Field(0.5, description="Weight of the distance of unsafe states, which are to go.")
    cosine: Weight = Field(0.1, description="Weight of the pairwise cosine distance of unsafe sequences.")
    kl: Weight = Field(0.3, description="Weight of the KL on retain conversations.")
    pair: Weight = Field(0.0, description="Weight of the pair term.")
    unsafe_limit: UnsafeLimit = None
    loss_mode: RowMode = "response_all"
    pair_positions: Positive = Field(20, description="Tokens of each half that the pair term reads.")
    published_quirks: Quirks = False

    @property
    def needs_pairs(self) -> bool:
        return self.pair > 0 or super().needs_pairs

    @property
    def compares_unsafe(self) -> bool:
        return self.cosine > 0

    @property
    def replaceable(self) -> frozenset[str]:
        # Where prompts alone count, the safe ones are those of safe records: a pair's asks for something unsafe.
        return frozenset({"unsafe"}) if self.loss_mode in PROMPT_MODES else super().replaceable

    @property
    def roles(self) -> tuple[Role, ...]:
        safe: tuple[Role, ...] = ("safe",) if self.loss_mode in PROMPT_MODES else ("safe", "pair")
        bent: tuple[Role, ...] = ("unsafe", "pair") if self.unsafe or self.cosine or self.pair else ()
        return self.with_kept((*(safe if self.safe else ()), *bent))

    @classmethod
    def recorded(cls, case: Entry, expected: Entry) -> RepBendConfig:
        """See :class:`MethodConfig`."""
        weights = {"safe": case["alpha"], "unsafe": case["beta"], "cosine": case["gamma"], "kl": case["epsilon"]}
        modes = {"loss_mode": case["loss_mode"], "alpha_mode": case["alpha_mode"]}
        return cls(**weights, **modes, **recorded_window(expected), published_quirks=True)


@method(RepBendConfig)
class RepBend(Windowed[RepBendConfig]):
    """Streams ``safe``, ``unsafe`` and ``retain``."""

    def staying(self, batch: Batch) -> list[Stream]:
        config, alone = self.config, self.config.loss_mode in PROMPT_MODES
        sequences = tuple(s.prompt for s in batch.safe) if alone else safe_sequences(batch)
        rows, layers = mode_rows(sequences, config.loss_mode), self.staying_layers
        term = layered_distance("safe", rows, layers, config.safe, config.distance_unit)
        return [Stream("safe", sequences, (term,))] if config.safe else []

    def bent(self, batch: Batch) -> list[Stream]:
        config, window, unit = self.config, self.config.window, self.config.distance_unit
        sequences = forget_sequences(batch)
        if config.loss_mode in PROMPT_MODES and not config.pair:  # the pair term reads the answers in every mode
            sequences = tuple(s.prompt for s in sequences)
        rows = mode_rows(sequences, config.loss_mode)
        if config.published_quirks and config.loss_mode == "prompt_last":
            # A slip of the published code: its mask is filled for the first B sequences only.
            rows = (*rows[: len(batch.unsafe)], *((0, 0) for _ in batch.pairs))
        terms: list[Term] = []
        if config.unsafe:
            terms.append(layered_distance("unsafe", rows, window, -config.unsafe, unit, config.unsafe_limit))
        if config.pair:
            terms.append(pair_distance("pair", batch, config.pair_positions, window, config.pair, unit))
        if config.cosine and len(sequences) > 1:
            positions = tuple(s.prompt_length - 1 for s in sequences)
            terms.append(PairwiseCosine("cosine", window, positions, config.cosine))
        return [Stream("unsafe", sequences, tuple(terms))] if terms else []

    def probes(self, batch: Batch) -> Probes:
        # What moves is of interest where its own term has no weight as well.
        weights = {"safe": self.config.safe or 1.0, "unsafe": self.config.unsafe or 1.0}
        every = RepBend(self.config.model_copy(update=weights), self.num_blocks)
        bent, kept = (replace(s, terms=s.terms[:1]) for s in (*every.bent(batch), *every.staying(batch)))
        return Probes(bent if bent.sequences else None, kept if kept.sequences else None)
