"""CRL, contrastive representation learning with triplets (Simko et al., EMNLP 2025, arXiv 2506.11938).

    L = α·mean relu(‖h_s − r_s‖ − d(h_s, m) + p) + β·mean relu(d(h_u, m) − d(h_u, r_u) + q) + ε·K,    d = 1 − cos

m, one per hidden state, is the mean adapted state over the unsafe rows of the batch, and is differentiated through, as
in the published code. The first mean runs over the safe rows and all hidden states (or the window), the second over the
unsafe rows and the window. With ``distance: cosine`` ‖h_s − r_s‖ is d(h_s, r_s) instead. K is RepBend's. Safe and
unsafe sequences are one stream, because m couples them. ``objectives.refusal`` may be added.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.adversarial import with_copies
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.choices import AnswerMode
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import NOTHING, count, forget_sequences, mean_distance, mode_rows, safe_sequences
from repbend_fast.objectives.sections import TITLES
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Triplet, Triplets
from repbend_fast.objectives.windowed import Windowed, WindowedConfig
from repbend_fast.section import Weight


class CRLConfig(WindowedConfig):
    """CRL: triplets around the mean adapted unsafe state, safe·S + unsafe·U + kl·K."""

    place: ClassVar[int] = 5
    stream_names: ClassVar[tuple[str, ...]] = with_copies("triplet", "retain", "refusal", of=("triplet",))
    titles: ClassVar[dict[str, str]] = {"safe": "safe: triplet loss", "unsafe": "unsafe: triplet loss", **TITLES}
    moving: ClassVar[tuple[str, str]] = ("safe", "unsafe")
    published_names: ClassVar[dict[str, str]] = {
        "loss_margin_p": "objective.safe_margin",
        "loss_margin_n": "objective.unsafe_margin",
    }

    name: Literal["crl"] = "crl"
    safe: Weight = Field(0.5, description="Weight of the safe triplets.")
    unsafe: Weight = Field(0.6, description="Weight of the unsafe triplets.")
    kl: Weight = Field(0.7, description="Weight of the KL on retain conversations.")
    safe_margin: Weight = Field(2.0, description="Margin of the safe triplets.")
    unsafe_margin: Weight = Field(3.0, description="Margin of the unsafe triplets.")
    distance: Literal["l2", "cosine"] = Field(
        "l2", description="Of safe states to their reference: a length, or 1 − cos, which needs margins below 2."
    )
    loss_mode: AnswerMode = Field("response_all", description="Which tokens' states count.")

    @property
    def roles(self) -> tuple[Role, ...]:
        bent: tuple[Role, ...] = ("unsafe", "pair") if self.safe or self.unsafe else ("pair",)
        return self.with_kept(("safe", *bent) if self.safe else bent)


@method(CRLConfig)
class CRL(Windowed[CRLConfig]):
    """Streams ``triplet`` (safe sequences, then unsafe ones) and ``retain``."""

    def probes(self, batch: Batch) -> Probes:
        layers = tuple(x for x in self.config.window if x > 0)
        unit = self.config.distance_unit
        bent = mean_distance("unsafe", forget_sequences(batch), layers, unit)
        return Probes(bent, mean_distance("safe", self._safe_sequences(batch), layers, unit))

    def _safe_sequences(self, batch: Batch) -> tuple[Sequence, ...]:
        return safe_sequences(batch) if self.config.safe else ()

    def bent(self, batch: Batch) -> list[Stream]:
        config, safe, unsafe = self.config, self._safe_sequences(batch), forget_sequences(batch)
        safe_spans = (*mode_rows(safe, config.loss_mode), *(NOTHING for _ in unsafe))
        unsafe_spans = (*(NOTHING for _ in safe), *mode_rows(unsafe, config.loss_mode))
        # The embeddings cannot be moved, but their constant triplets belong to the published value.
        layers = self.staying_layers
        kept = Triplet("safe", layers, safe_spans, config.safe, count(safe_spans) * len(layers), config.safe_margin)
        window, rows = config.window, count(unsafe_spans)
        bent = Triplet("unsafe", window, unsafe_spans, config.unsafe, rows * len(window), config.unsafe_margin)
        term = Triplets(kept, bent, config.distance_unit, config.distance)
        # Without both of its terms the stream would run for nothing.
        return [Stream("triplet", (*safe, *unsafe), (term,))] if config.safe or config.unsafe else []
