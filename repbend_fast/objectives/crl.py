"""CRL, contrastive representation learning with triplets (Simko et al., EMNLP 2025, arXiv 2506.11938).

    L = α·mean relu(‖h_s − r_s‖ − d(h_s, m) + p) + β·mean relu(d(h_u, m) − d(h_u, r_u) + q) + ε·K,    d = 1 − cos

m, one per hidden state, is the mean adapted state over the unsafe rows of the batch, and is differentiated through, as
in the published code. The first mean runs over the safe rows and all hidden states (or the window), the second over the
unsafe rows and the window. With ``distance: cosine`` ‖h_s − r_s‖ is d(h_s, r_s) instead. K is RepBend's. Safe and
unsafe sequences are one stream, because m couples them. ``objectives.refusal`` may be added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.adversarial import AttackedConfig, with_perturbed
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import (
    NOTHING,
    count,
    forget_sequences,
    kl_stream,
    mean_distance,
    mode_rows,
    safe_sequences,
)
from repbend_fast.objectives.sections import TITLES, AnswerMode, RefusalConfig, WindowConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Triplet, Triplets
from repbend_fast.section import Weight


class CRLConfig(AttackedConfig, RefusalConfig, WindowConfig):
    """CRL: triplets around the mean adapted unsafe state, safe·S + unsafe·U + kl·K."""

    place: ClassVar[int] = 5
    stream_names: ClassVar[tuple[str, ...]] = (
        *("triplet", "retain", "refusal"),
        *("perturbed_triplet", "perturbed_refusal"),
    )
    titles: ClassVar[dict[str, str]] = {"safe": "safe: triplet loss", "unsafe": "unsafe: triplet loss", **TITLES}
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

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.safe == 0 and self.unsafe == 0 and self.refusal == 0:
            yield (
                "objective.safe=0 with objective.unsafe=0: KL alone has no gradient while LoRA is at its start; give "
                "one, or objective.refusal, a weight above 0"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        bent: tuple[Role, ...] = ("unsafe", "pair") if self.safe or self.unsafe else ("pair",)
        roles: tuple[Role, ...] = ("safe", *bent) if self.safe else bent
        return (*roles, "retain") if self.kl else roles


@method(CRLConfig)
class CRL:
    """Streams ``triplet`` (safe sequences, then unsafe ones) and ``retain``."""

    def __init__(self, config: CRLConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps  # the weights are constant
        config = config.within(num_blocks)
        self.config = config
        self.num_blocks = num_blocks
        self.last_state = max(config.window)
        self.seed = seed
        self.uses_head = config.kl > 0 or config.refusal > 0 or config.adversarial.weight > 0
        self.roles = config.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        config = self.config
        # Without both of its terms the triplets' stream would run for nothing.
        triplet = [self._triplet(batch)] if config.safe or config.unsafe else []
        retain = kl_stream(config, batch.retain if config.kl else ())
        streams = [s for s in (*triplet, retain) if s.sequences]
        streams += refusal_streams(config, batch, step, self.seed)
        return with_perturbed(config, streams, ("triplet",), batch, self.num_blocks)

    def probes(self, batch: Batch) -> Probes:
        layers = tuple(x for x in self.config.window if x > 0)
        unit = self.config.distance_unit
        bent = mean_distance("unsafe", forget_sequences(batch), layers, unit)
        return Probes(bent, mean_distance("safe", self._safe_sequences(batch), layers, unit))

    def _safe_sequences(self, batch: Batch) -> tuple[Sequence, ...]:
        return safe_sequences(batch) if self.config.safe else ()

    def _triplet(self, batch: Batch) -> Stream:
        config, safe, unsafe = self.config, self._safe_sequences(batch), forget_sequences(batch)
        safe_spans = (*mode_rows(safe, config.loss_mode), *(NOTHING for _ in unsafe))
        unsafe_spans = (*(NOTHING for _ in safe), *mode_rows(unsafe, config.loss_mode))
        # The embeddings cannot be moved, but their constant triplets belong to the published value.
        layers = tuple(range(self.num_blocks + 1)) if config.alpha_mode == "all" else config.window
        kept = Triplet("safe", layers, safe_spans, config.safe, count(safe_spans) * len(layers), config.safe_margin)
        window, rows = config.window, count(unsafe_spans)
        bent = Triplet("unsafe", window, unsafe_spans, config.unsafe, rows * len(window), config.unsafe_margin)
        return Stream("triplet", (*safe, *unsafe), (Triplets(kept, bent, config.distance_unit, config.distance),))
