"""CRL, contrastive representation learning with triplets (Simko et al., EMNLP 2025, arXiv 2506.11938).

    L = α·mean relu(‖h_s − r_s‖ − d(h_s, m) + p) + β·mean relu(d(h_u, m) − d(h_u, r_u) + q) + ε·K,    d = 1 − cos

m, one per hidden state, is the mean adapted state over the unsafe rows of the batch, and is differentiated through, as in the
published code. The first mean runs over the safe rows and all hidden states (or the window), the second over the unsafe rows and
the window. K is RepBend's. Safe and unsafe sequences are one stream, because m couples them.
``objectives.refusal`` may be added.
"""

from __future__ import annotations

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.base import HeadKL, Span, Stream, Triplet, Triplets, all_rows, count, forget_sequences, l2_probe, mode_rows
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.sections import CRLConfig
from repbend_fast.objectives.states import check_states


class CRL:
    """Streams ``triplet`` (safe sequences, then unsafe ones) and ``retain``."""

    def __init__(self, config: CRLConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps  # the weights are constant
        config = config.at_depth(num_blocks)
        check_states("objective.window_start + window_size - 1", [max(config.window)], num_blocks)
        self.config = config
        self.num_blocks = num_blocks
        self.last_state = max(config.window)
        self.seed = seed
        self.uses_head = config.kl > 0 or config.refusal > 0
        self.roles = self.required_roles(config)

    @staticmethod
    def required_roles(config: CRLConfig) -> tuple[Role, ...]:
        """The roles whose records the terms with a weight read."""
        roles: tuple[Role, ...] = ("safe", "unsafe", "pair") if config.safe else ("unsafe", "pair") if config.unsafe else ("pair",)
        return (*roles, "retain") if config.kl else roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        config = self.config
        # Without both of its terms the triplets' stream would run for nothing.
        triplet = [self._triplet(batch)] if config.safe or config.unsafe else []
        retain = self._retain(batch.retain if config.kl else ())
        return [*(s for s in (*triplet, retain) if s.sequences), *refusal_streams(config, batch, step, self.seed)]

    def probes(self, batch: Batch) -> list[Stream]:
        layers = tuple(x for x in self.config.window if x > 0)
        unit = self.config.distance_unit
        return [*l2_probe("unsafe", forget_sequences(batch), layers, unit), *l2_probe("safe", self._safe_sequences(batch), layers, unit)]

    def _safe_sequences(self, batch: Batch) -> tuple[Sequence, ...]:
        return (*batch.safe, *(pair.safe for pair in batch.pairs)) if self.config.safe else ()

    def _triplet(self, batch: Batch) -> Stream:
        config, safe, unsafe = self.config, self._safe_sequences(batch), forget_sequences(batch)
        nothing: Span = (0, 0)
        safe_spans = (*mode_rows(safe, config.loss_mode), *(nothing for _ in unsafe))
        unsafe_spans = (*(nothing for _ in safe), *mode_rows(unsafe, config.loss_mode))
        # The embeddings cannot be moved, but their constant triplets belong to the published value.
        layers = tuple(range(self.num_blocks + 1)) if config.alpha_mode == "all" else config.window
        kept = Triplet("safe", layers, safe_spans, config.safe, count(safe_spans) * len(layers), config.safe_margin)
        bent = Triplet("unsafe", config.window, unsafe_spans, config.unsafe, count(unsafe_spans) * len(config.window), config.unsafe_margin)
        return Stream("triplet", (*safe, *unsafe), triplets=Triplets(kept, bent, config.distance_unit))

    def _retain(self, sequences: tuple[Sequence, ...]) -> Stream:
        spans = all_rows(sequences)
        denominator = max(1, len(spans)) if self.config.kl_reduction == "sequence" else count(spans)
        return Stream("retain", sequences, head=HeadKL("kl", spans, self.config.kl, denominator, self.config.temperature))
