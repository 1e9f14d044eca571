"""Representation Bending (Yousefpour et al., ACL 2025, arXiv 2504.01550).

    L = α·S − β·U + γ·C + ε·K (+ η·P + ρ·F)

S, U: mean l2 distance to the reference over rows × layers of the safe and the unsafe stream. C: mean pairwise 1 − cos of the
last prompt tokens of the unsafe stream. K: T²-scaled KL on the retain stream. P: unsafe answers against the safe reference.
F: ``objectives.refusal``.
"""

from __future__ import annotations

from dataclasses import replace

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.errors import UserError
from repbend_fast.objectives.base import Distance, HeadKL, PairwiseCosine, Span, Stream, select_rows
from repbend_fast.objectives.refusal import refusal_streams, with_pairs
from repbend_fast.objectives.sections import PROMPT_MODES, ObjectiveConfig


def required_roles(config: ObjectiveConfig) -> tuple[Role, ...]:
    """The roles whose records the terms with a weight read."""
    roles: list[Role] = []
    if config.safe:
        roles += ["safe"] if config.loss_mode in PROMPT_MODES else ["safe", "pair"]
    if config.unsafe or config.cosine or config.pair:
        bending: list[Role] = ["unsafe", "pair"]
        roles += [role for role in bending if role not in roles]
    if config.kl:
        roles.append("retain")
    return with_pairs(tuple(roles), config)


class RepBend:
    """RepBend's streams for one model. ``num_blocks`` decoder blocks give hidden states 0 … num_blocks."""

    required_roles = staticmethod(required_roles)

    def __init__(self, config: ObjectiveConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps  # the weights are constant
        config = config.at_depth(num_blocks)
        if max(config.window) > num_blocks:
            raise UserError(
                f"objective.window_start={config.window_start}, window_size={config.window_size}: the window ends at hidden state "
                f"{max(config.window)}, but this model has hidden states 0 … {num_blocks}"
            )
        self.config = config
        self.num_blocks = num_blocks
        self.roles = required_roles(config)
        self.seed = seed
        self.uses_head = config.kl > 0 or config.refusal > 0
        self.last_state = max(config.window)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        candidates = (self._safe(batch), self._unsafe(batch), self._retain(batch))
        return [*(s for s in candidates if s is not None), *refusal_streams(self.config, batch, step, self.seed)]

    def probes(self, batch: Batch) -> list[Stream]:
        # What moves is of interest where its own term has no weight as well.
        weights = {"safe": self.config.safe or 1.0, "unsafe": self.config.unsafe or 1.0}
        every = RepBend(self.config.model_copy(update=weights), self.num_blocks)
        streams = [s for s in (every._unsafe(batch), every._safe(batch)) if s is not None and s.sequences]
        return [replace(s, distances=s.distances[:1], pairwise=None) for s in streams]

    def _safe(self, batch: Batch) -> Stream | None:
        config = self.config
        if not config.safe:
            return None
        if config.loss_mode in PROMPT_MODES:
            sequences = tuple(s.prompt for s in batch.safe)
        else:
            sequences = (*batch.safe, *(p.safe for p in batch.pairs))
        # The embedding's distance is zero and has no gradient; it is counted in the denominator and not read.
        every = config.alpha_mode == "all"
        layers = tuple(range(1, self.num_blocks + 1)) if every else config.window
        return Stream("safe", sequences, (self._distance("safe", sequences, layers, config.safe, len(layers) + every),))

    def _unsafe(self, batch: Batch) -> Stream | None:
        config = self.config
        sequences: tuple[Sequence, ...] = (*batch.unsafe, *(p.unsafe for p in batch.pairs))
        if config.loss_mode in PROMPT_MODES and not config.pair:  # the pair term reads the answers in every mode
            sequences = tuple(s.prompt for s in sequences)
        distances: list[Distance] = []
        if config.unsafe:
            # A slip of the published code: with prompt_last its row mask is filled for the first B sequences only.
            read = len(batch.unsafe) if config.published_quirks and config.loss_mode == "prompt_last" else len(sequences)
            distance = self._distance("unsafe", sequences, config.window, -config.unsafe, len(config.window), read)
            distances.append(replace(distance, limit=config.unsafe_limit))
        if config.pair:
            distances.append(self._pair(batch))
        pairwise = None
        if config.cosine and len(sequences) > 1:
            positions = tuple(s.prompt_length - 1 for s in sequences)
            pairwise = PairwiseCosine("cosine", config.window, positions, config.cosine)
        if not distances and pairwise is None:
            return None
        return Stream("unsafe", sequences, tuple(distances), pairwise)

    def _retain(self, batch: Batch) -> Stream | None:
        config = self.config
        if not config.kl:
            return None
        spans = tuple((0, len(s)) for s in batch.retain)
        denominator = len(spans) if config.kl_reduction == "sequence" else sum(stop for _, stop in spans)
        return Stream("retain", batch.retain, head=HeadKL("kl", spans, config.kl, denominator, config.temperature))

    def _distance(
        self, name: str, sequences: tuple[Sequence, ...], layers: tuple[int, ...], weight: float, counted: int, read: int | None = None
    ) -> Distance:
        spans = tuple(select_rows(s, self.config.loss_mode) if read is None or i < read else (0, 0) for i, s in enumerate(sequences))
        rows = sum(stop - start for start, stop in spans)
        # Hidden state 0 may lie in a user's window; its distance is zero as well.
        return Distance(name, tuple(x for x in layers if x > 0), spans, weight, max(1, rows * counted), unit=self.config.distance_unit)

    def _pair(self, batch: Batch) -> Distance:
        config = self.config
        spans: list[Span] = [(0, 0)] * len(batch.unsafe)
        against: list[Sequence | None] = [None] * len(batch.unsafe)
        for pair in batch.pairs:
            first = pair.unsafe.prompt_length - 1
            shared = min(len(pair.unsafe), len(pair.safe)) - first
            spans.append((first, first + min(config.pair_positions, shared)))
            against.append(pair.safe)
        rows = sum(stop - start for start, stop in spans)
        denominator = max(1, rows * len(config.window))
        return Distance("pair", config.window, tuple(spans), config.pair, denominator, against=tuple(against), unit=config.distance_unit)
