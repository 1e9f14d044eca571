"""X-Boundary (Lu et al., arXiv 2502.09990): Circuit Breakers with answers that are kept apart from those to be refused.

    L = c_r·mean ‖h − r‖₂ + c_x·(Σ_erase relu(cos(h, r)) + Σ_boundary relu(ĥ·m)) / rows of both
    c_r = a·t/T,  c_x = a·(1 − t/T),  t = 1 … T

The mean runs over the rows of what is kept (the retain records, and the safe halves of pairs) and all hidden states,
the sums over ``layers``. Erased are the unsafe records. The boundary's rows are those of the pairs' unsafe halves, m is
the mean of the unit rows that the reference has in the same pair's safe half. ``objectives.refusal`` may be added.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.objectives.adversarial import with_copies
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rerouting import Rerouting, ReroutingConfig
from repbend_fast.objectives.rows import count, mode_rows
from repbend_fast.objectives.sections import TITLES
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import BoundaryCosine, Distance
from repbend_fast.section import AboveZero


class XBoundaryConfig(ReroutingConfig):
    """X-Boundary: L = c_r·mean ‖h − r‖ on retain + c_x·mean (relu(cos(h, r)) on erased, relu(ĥ·m) on boundary rows)."""

    place: ClassVar[int] = 9
    stream_names: ClassVar[tuple[str, ...]] = with_copies(
        "erase", "boundary", "retain", "refusal", of=("erase", "boundary")
    )
    titles: ClassVar[dict[str, str]] = {
        "erase": "erase: cosine to the reference",
        "boundary": "boundary: cosine to what is kept",
        "retain": "retain: kept at the reference",
        "refusal": TITLES["refusal"],
    }

    name: Literal["x_boundary"] = "x_boundary"
    coefficient: AboveZero = Field(10.0, description="a of c_r = a·t/T and c_x = a·(1 − t/T).")
    boundary_mode: Literal["prompt_all", "prompt_response", "response_all"] = Field(
        "prompt_all", description="Which tokens' states of the pairs' unsafe halves are kept away from the safe ones."
    )

    @property
    def replaceable(self) -> frozenset[str]:
        return frozenset({"safe"})  # pairs stand for the boundary alone


@method(XBoundaryConfig)
class XBoundary(Rerouting[XBoundaryConfig]):
    """Streams ``erase``, ``boundary`` and ``retain``."""

    def kept_share(self, step: int) -> float:
        return min((step + 1) / self.steps, 1.0)

    def bent(self, batch: Batch, weight: float) -> list[Stream]:
        erased, apart = batch.unsafe, tuple(pair.unsafe for pair in batch.pairs)
        erase_spans = mode_rows(erased, self.config.loss_mode)
        apart_spans = mode_rows(apart, self.config.boundary_mode)
        denominator = count((*erase_spans, *apart_spans)) * len(self.layers)
        erase = Distance("erase", self.layers, erase_spans, weight, denominator, kind="relu_cosine")
        against = tuple(pair.safe for pair in batch.pairs)
        boundary = BoundaryCosine("boundary", self.layers, apart_spans, weight, denominator, against)
        streams = (Stream("erase", erased, (erase,)), Stream("boundary", apart, (boundary,)))
        return [stream for stream in streams if stream.sequences]

    def kept(self, batch: Batch) -> tuple[Sequence, ...]:
        return (*batch.retain, *(pair.safe for pair in batch.pairs))
