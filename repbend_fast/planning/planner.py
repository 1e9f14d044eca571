"""The planner: the fastest levers whose peak stays under a budget, known before any weight is loaded.

``Planner`` measures a recipe's streams once (``peaks``), then answers for any budget. What it chooses is run again on
fake tensors at full depth through the same ``StreamRunner`` that trains, and corrected where the prediction fell short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product

import torch

from repbend_fast.config import Config
from repbend_fast.errors import UserError
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.varlen import attention_of
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import rows_in
from repbend_fast.planning.batches import Limits, even_batch, limits_of, published_batch
from repbend_fast.planning.budget import Standing, budget_bytes, show_bytes, standing, taken
from repbend_fast.planning.cards import GB, Card, card_of
from repbend_fast.planning.cost import StepCost, matrices
from repbend_fast.planning.host import HostCost, host_cost
from repbend_fast.planning.peaks import Peak, PeakMeter, StreamPeak, measure_batch, measure_piece, shared_peak
from repbend_fast.planning.profile import Profile, profile_key
from repbend_fast.planning.shapes import model_shape, shape_model
from repbend_fast.step.levers import EVERY_STREAM, Levers, default_levers

CHUNKS = (None, 128, 64, 32)
"""Rows per chunk of the head's losses, in the order in which they are tried; None is the op's own rule."""
PIECE_SIZES = (0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7)
"""Piece sizes that are tried, in units of the longest sequence."""
LENGTH_BATCHES = 4
"""Micro-batches of published lengths over which an expected time is taken."""
STATES_ON_DEVICE = 2
"""Inputs of recomputed blocks that stay on the device with ``offload_checkpoints``."""
TRIES = 4
"""Times that levers are chosen anew because the run at full depth took more than was predicted."""


@dataclass(frozen=True)
class Plan:
    """What a run would do and take. Bytes; ``streams`` has each stream's peak above what stands."""

    levers: Levers
    standing: Standing
    streams: Mapping[str, int]
    total: int
    budget: int | None
    seconds: float
    flops: Mapping[str, float]
    tokens: float
    limit: str
    notes: tuple[str, ...] = field(default=())


class Planner:
    """Plans one recipe for one device.

    Args:
        config: the recipe; levers set by hand in ``config.memory`` stay as they are.
        device: the kind of device that is planned for; it need not be there.
        card: its rates; None takes the table's card for ``device``.
        limits: the longest sequences that can come; None takes the recipe's token limits.
        host: what launching costs; None takes what this machine was measured at.

    Raises:
        UserError: the model's configuration cannot be read, or the objective does not fit it.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        card: Card | None = None,
        limits: Limits | None = None,
        host: HostCost | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.card = card or card_of(device)
        self.host = host or host_cost(device)
        self.limits = limits or limits_of(config)
        shape, note = model_shape(config.model)
        self.notes = (note,) if note else ()
        self.num_blocks = int(shape.get_text_config().num_hidden_layers)
        self.objective = build_objective(config.objective, self.num_blocks, config.training.steps, seed=None)
        self.model = shape_model(config.model, config.lora, (self.objective.last_state,))
        attention = attention_of(find_decoder(self.model).body, self.model.get_input_embeddings().weight, device)
        self.base_levers = default_levers(config.memory, self.num_blocks, device, attention)
        self.pairs = "pair" in self.objective.roles
        self.standing = standing(self.model, config, device)
        self.meter = PeakMeter(self.model, config, (self.objective.last_state,), device, self.base_levers.packing)
        self.checks = True
        self.profile = Profile(profile_key(config, shape, device, self.limits, self.base_levers, attention))
        self.use_card(self.card)

    def use_card(self, card: Card) -> None:
        """Take another card's rates; what was measured stays."""
        self.card = card
        sizes = matrices(self.model, self.config.model.quantization == "nf4", self.meter.first_block)
        self.cost = StepCost(sizes, self.num_blocks, card, self.host)

    @cached_property
    def peaks(self) -> list[StreamPeak]:
        """Each stream's peaks, measured on fake tensors."""
        return self.profile.stream_peaks(self._measured_peaks)

    def _measured_peaks(self) -> list[StreamPeak]:
        half = max(2, self.limits.longest // 2)
        small = self._streams(2, half)
        counts = {s.name: len(s.sequences) for s in self.expected[0]}
        large = self._streams(2 * max(counts.values()), half)
        found = []
        longest_streams = self._streams(2, self.limits.longest)
        # What is chosen is run once more, through all blocks; where streams share their passes that is one run.
        self.profile.expect(len(longest_streams), len(longest_streams) if self.checks else 0)
        for name, whole in longest_streams.items():
            longest = max(map(len, whole.sequences))
            rows = max((rows_in((span,)) for term in whole.terms for span in term.compared_spans), default=longest)
            sizes = small[name], large[name], counts[name] * longest, longest, rows
            found.append(self.profile.measured(f"{name} stream", partial(self.meter.stream_peak, *sizes)))
        return found

    @cached_property
    def expected(self) -> list[list[Stream]]:
        """Micro-batches of published lengths, as streams."""
        draw = partial(published_batch, self.config.training.sizes, self.limits, self.pairs)
        return [self.objective.streams(draw(seed), 0) for seed in range(LENGTH_BATCHES)]

    def plan(self, budget: int | None, check: bool = True) -> Plan:
        """The plan for ``budget`` bytes; without one, the levers as the recipe has them.

        Args:
            check: run what was chosen at full depth, some seconds for a model of 32 blocks; without it the plan is the
                prediction.

        Raises:
            UserError: the budget cannot be kept; names the smallest that can, and its levers.
        """
        self.checks = check
        with self.profile.shown():
            return self._planned(budget, self._checked if check else self._unchecked)

    def _planned(self, budget: int | None, settle: Callable[[Levers, int | None], Plan]) -> Plan:
        if budget is None:
            return settle(self.base_levers, None)
        within = budget
        for _ in range(TRIES):
            levers = self._fastest(within)
            if levers is None:
                break
            plan = settle(levers, budget)
            if plan.total <= budget:
                return plan
            within -= plan.total - budget
        least = settle(self.smallest()[1], budget)
        if least.total <= budget:
            return least
        raise UserError(self._refusal(budget, least))

    def smallest(self) -> tuple[int, Levers]:
        """The smallest budget that can be kept, by prediction, and the levers that keep it with the fewest
        departures.
        """
        found = []
        for number, levers in enumerate(self._settings()):
            sizes = (
                {p.name: max(1, p.longest // 2) for p in self.peaks}
                if self._free("piece_tokens")
                else levers.piece_tokens
            )
            levers = replace(levers, piece_tokens=sizes)
            found.append((self._predicted(levers), number, levers))
        size, _, levers = min(found, key=lambda item: item[:2])
        return size, levers

    def _streams(self, count: int, length: int) -> dict[str, Stream]:
        """By name the streams of a batch of ``count`` sequences of ``length`` tokens per role.

        Of the batches that could be asked for, each stream is taken from the one that fills it: halves of pairs where
        it compares them or reads nothing else, long prompts where it reads no answers.
        """
        roles = set(self.objective.roles)
        of_pairs = (False,) if "pair" not in roles else (True,) if roles <= {"pair", "retain"} else (True, False)
        found: dict[str, Stream] = {}
        for prompts, pairs in product((True, False), of_pairs):
            for stream in self.objective.streams(even_batch(count, length, self.limits, pairs, prompts), 0):
                fills = max(map(len, stream.sequences), default=0)
                known = found.get(stream.name)
                if (
                    fills
                    and (pairs or stream.name not in self.comparing)
                    and (known is None or fills >= max(map(len, known.sequences)))
                ):
                    found[stream.name] = stream
        return {s.name: found[s.name] for s in self.expected[0] if s.name in found}

    @cached_property
    def comparing(self) -> set[str]:
        """Streams that compare the halves of pairs."""
        return {s.name for s in self.expected[0] if any(term.compares_pairs for term in s.terms)}

    def _free(self, name: str) -> bool:
        """Whether a lever is the planner's to choose."""
        return getattr(self.config.memory, name) == "auto"

    def _settings(self) -> Iterator[Levers]:
        """All levers but the piece sizes, the ones that depart least from the plain step first."""
        offloads = (False, True) if self.device.type == "cuda" else (False,)
        choices = {
            "offload_embedding": offloads,
            "offload_checkpoints": offloads,
            "kl_chunk_rows": CHUNKS,
            "checkpoint_blocks": range(self.num_blocks + 1),
            "merge_streams": ("off", "on") if self.device.type == "cuda" else ("off",),
        }
        free = {
            name: values if self._free(name) else (getattr(self.base_levers, name),) for name, values in choices.items()
        }
        for values in product(*free.values()):
            levers = replace(self.base_levers, **dict(zip(free, values)))
            if levers.checkpoint_blocks or not levers.offload_checkpoints:
                yield levers

    def _fastest(self, budget: int) -> Levers | None:
        """The levers with the least expected time whose predicted peaks fit into ``budget``.

        A head in host memory visits the device for every token that validation generates, so it is the last resort.
        """
        best: tuple[float, Levers] | None = None
        for levers in self._settings():
            if best is not None and levers.offload_embedding and not best[1].offload_embedding:
                break
            found = (
                self._fastest_merged(levers, budget) if self._merges(levers) else self._fastest_apart(levers, budget)
            )
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return None if best is None else best[1]

    def _fastest_apart(self, levers: Levers, budget: int) -> tuple[float, Levers] | None:
        """Seconds, and the levers with piece sizes, where each stream has passes of its own; None where none fit."""
        chosen = [self._fastest_piece(place, peak, levers, budget) for place, peak in enumerate(self.peaks)]
        fitting = [choice for choice in chosen if choice is not None]
        if len(fitting) < len(chosen):
            return None
        sizes = {peak.name: size for peak, (_, size) in zip(self.peaks, fitting) if size is not None}
        here = replace(levers, piece_tokens=sizes) if self._free("piece_tokens") else levers
        return sum(seconds for seconds, _ in fitting), here

    def _fastest_merged(self, levers: Levers, budget: int) -> tuple[float, Levers] | None:
        """The same where streams share passes, all under one size."""
        best: tuple[float, Levers] | None = None
        longest, total = max(peak.longest for peak in self.peaks), sum(peak.total for peak in self.peaks)
        for size in self._sizes(longest, total, EVERY_STREAM):
            here = self._sized(levers, EVERY_STREAM, size)
            if self._predicted(here) > budget:
                break
            seconds = sum(self.cost.seconds(streams, here) for streams in self.expected)
            if best is None or seconds <= best[0]:
                best = seconds, here
        return best

    def _merges(self, levers: Levers) -> bool:
        return levers.merge_streams == "on" and len(self.peaks) > 1

    def _sized(self, levers: Levers, name: str, size: int | None) -> Levers:
        """The levers with a piece size, where it is the planner's to choose."""
        if not self._free("piece_tokens"):
            return levers
        return replace(levers, piece_tokens={} if size is None else {**levers.piece_tokens, name: size})

    def _fastest_piece(
        self, place: int, peak: StreamPeak, levers: Levers, budget: int
    ) -> tuple[float, int | None] | None:
        """Seconds and size of the fastest pieces of a stream that fit; None where none do.

        The largest are not always the fastest: padding grows with the sequences of a piece.
        """
        best: tuple[float, int | None] | None = None
        for size in self._sizes(peak.longest, peak.total, peak.name):
            if self._total(self._stream_bytes(peak, size, levers), levers) > budget:
                break
            here = self._sized(levers, peak.name, size)
            seconds = sum(self.cost.seconds([streams[place]], here) for streams in self.expected)
            if best is None or seconds <= best[0]:
                best = seconds, size
        return best

    def _sizes(self, longest: int, total: int, name: str) -> list[int | None]:
        """Sizes to try of pieces of ``total`` positions, smallest first; None is all of them, the first leaves the
        ``longest`` sequence alone.
        """
        if not self._free("piece_tokens"):
            return [self.base_levers.piece_size(name)]
        shares = (x for x in PIECE_SIZES if x * longest < total)
        return [*(max(1, int(x * longest)) for x in shares), None]

    def _positions(self, peak: StreamPeak, size: int | None) -> int:
        """Positions of the worst piece of a stream cut to ``size``."""
        return peak.total if size is None else max(size, peak.longest)

    def _stream_bytes(self, peak: StreamPeak, size: int | None, levers: Levers) -> int:
        """Predicted peak of a stream above what stands."""
        positions = self._positions(peak, size)
        # A size below half of the longest leaves the longest alone in its piece, and two shorter ones are no more than
        # that.
        alone = size is not None and size <= peak.longest // 2
        bare = peak.single(levers.checkpoint_blocks) if alone else peak.peak(positions, levers.checkpoint_blocks)
        return self._with_levers(bare, peak, positions, levers)

    def _with_levers(self, bare: Peak, peak: StreamPeak, positions: int, levers: Levers) -> int:
        """Add what chunks, offloading and rounding change: none shows on fake tensors."""
        scratch = self.meter.scratch(peak, positions, levers.kl_chunk_rows)
        if levers.offload_embedding and peak.head_rows:
            scratch += self.meter.head_bytes
        saved = 0
        if levers.offload_checkpoints:
            kept = min(levers.checkpoint_blocks, peak.stop) - peak.first
            saved = max(0, kept - STATES_ON_DEVICE) * positions * peak.checkpoint_bytes
        return max(0, bare.total(scratch) - saved) + self.meter.rounding_bytes

    def _total(self, stream: int, levers: Levers) -> int:
        stays = self.standing.without_table() if levers.offload_embedding else self.standing
        return taken(stays, stream, self.device)

    def _predicted(self, levers: Levers) -> int:
        if self._merges(levers):
            return self._total(self._shared_bytes(levers), levers)
        highest = max(self._stream_bytes(peak, levers.piece_size(peak.name), levers) for peak in self.peaks)
        return self._total(highest, levers)

    def _shared_positions(self, levers: Levers) -> int:
        """Positions of the worst batch of streams that share their passes."""
        total = sum(peak.total for peak in self.peaks)
        sizes = [size for peak in self.peaks if (size := levers.piece_size(peak.name)) is not None]
        return min(total, max([*sizes, *(peak.longest for peak in self.peaks)])) if sizes else total

    def _shared_bytes(self, levers: Levers) -> int:
        """Predicted peak of streams that share their passes."""
        positions = self._shared_positions(levers)
        bare, most = shared_peak(self.peaks, positions, levers.checkpoint_blocks)
        return self._with_levers(bare, most, positions, levers)

    def _shared_worst(self, levers: Levers) -> list[Stream]:
        """The streams as one batch that is as large as ``levers`` allow, all of them in proportion."""
        share = self._shared_positions(levers) / sum(peak.total for peak in self.peaks)
        length = max(2, int(self.limits.longest * share))
        counts = {stream.name: len(stream.sequences) for stream in self.expected[0]}
        asked = {peak.name: max(1, counts[peak.name] // self._per_record[peak.name]) for peak in self.peaks}
        return [self._streams(asked[peak.name], length)[peak.name] for peak in self.peaks]

    @cached_property
    def _per_record(self) -> dict[str, int]:
        """Sequences that each stream makes of one record per role: two where it joins two roles."""
        half = max(2, self.limits.longest // 2)
        return {name: len(stream.sequences) // 2 for name, stream in self._streams(2, half).items()}

    def _checked(self, levers: Levers, budget: int | None) -> Plan:
        """Run the worst piece of each stream at full depth under ``levers``, whose offloading is added by
        arithmetic.
        """
        here = replace(levers, piece_tokens={}, offload_checkpoints=False, offload_embedding=False)
        if self._merges(levers):
            worst = self._shared_worst(levers)
            run = partial(measure_batch, self.model, worst, here, self.device, self.meter.autocast)
            measured = self.profile.batch(worst, here, run)
            positions = sum(len(s) for stream in worst for s in stream.sequences)
            _, most = shared_peak(self.peaks, positions, levers.checkpoint_blocks)
            most = replace(most, head_rows=max(stream.head_rows() for stream in worst) / positions)
            streams = {most.name: self._with_levers(measured, most, positions, levers)}
            return self._plan(levers, streams, self._total(max(streams.values()), levers), budget)
        streams = {}
        for peak, piece in zip(self.peaks, self.worst_streams(levers)):
            run = partial(measure_piece, self.model, piece, here, self.device, self.meter.autocast)
            measured = self.profile.batch([piece], here, run)
            streams[peak.name] = self._with_levers(measured, peak, sum(map(len, piece.sequences)), levers)
        return self._plan(levers, streams, self._total(max(streams.values()), levers), budget)

    def _unchecked(self, levers: Levers, budget: int | None) -> Plan:
        if self._merges(levers):
            streams = {"merged": self._shared_bytes(levers)}
        else:
            streams = {peak.name: self._stream_bytes(peak, levers.piece_size(peak.name), levers) for peak in self.peaks}
        return self._plan(levers, streams, self._total(max(streams.values()), levers), budget)

    def worst_streams(self, levers: Levers) -> list[Stream]:
        """Each stream as the worst piece that ``levers`` allow."""
        found = []
        half = max(2, self.limits.longest // 2)
        shares = self._per_record
        for peak in self.peaks:
            size = levers.piece_size(peak.name)
            alone = size is not None and size <= peak.longest // 2
            positions = self._positions(peak, size)
            count = 1 if alone else max(2, -(positions // -min(half, peak.longest)))
            # Of each sequence that is asked for, a stream that joins two roles makes two.
            asked = -(count // -shares[peak.name])
            length = max(2, (self.limits.longest if alone else positions) // (asked * shares[peak.name]))
            made = self._streams(asked, length)
            # A stream that only compares sequences with each other has none of one.
            worst = made[peak.name] if peak.name in made else self._streams(2, max(2, length // 2))[peak.name]
            added = max(map(len, worst.sequences)) - length
            if added > 0 and not alone:
                # A stream that makes the records' sequences longer: it fills the piece with shorter records.
                worst = self._streams(asked, max(2, length - added))[peak.name]
            found.append(worst)
        return found

    def _plan(self, levers: Levers, streams: dict[str, int], total: int, budget: int | None) -> Plan:
        batches = len(self.expected)
        steps = self.config.training.accumulation
        flops: dict[str, float] = {}
        for expected in self.expected:
            for name, value in self.cost.flops(expected, levers).items():
                flops[name] = flops.get(name, 0.0) + value * steps / batches
        seconds = sum(self.cost.seconds(expected, levers) for expected in self.expected) * steps / batches
        tokens = (
            sum(len(s) for expected in self.expected for stream in expected for s in stream.sequences) * steps / batches
        )
        limit = self._limit(levers, streams, budget)
        stays = self.standing.without_table() if levers.offload_embedding else self.standing
        return Plan(levers, stays, streams, total, budget, seconds, flops, tokens, limit, self.notes)

    def _limit(self, levers: Levers, streams: dict[str, int], budget: int | None) -> str:
        largest = max(streams, key=lambda name: streams[name])
        most = "the streams share their passes" if self._merges(levers) else f"the {largest} stream is the largest"
        if budget is None:
            return f"no budget: one piece per stream unless set by hand; {most}"
        spent = []
        if levers.checkpoint_blocks:
            spent.append(f"{levers.checkpoint_blocks} of {self.num_blocks} blocks are recomputed")
        if levers.piece_tokens:
            spent.append("streams are split")
        if not spent:
            return "compute: everything fits without recomputation or splitting"
        return f"memory ({' and '.join(spent)}); {most}"

    def _refusal(self, budget: int, least: Plan) -> str:
        unit, name = (10**7, "GB") if least.total >= GB else (10**4, "MB")
        shown = f"{-(least.total // -unit) / 100:.2f}{name}"
        remedies = ["or lower data.max_prompt_tokens or data.max_answer_tokens"]
        if self.config.model.quantization == "none":
            remedies.append("or set model.quantization=nf4")
        if self.config.training.optimizer == "adamw":
            remedies.append("or set training.optimizer=adamw_8bit")
        return (
            f"memory.budget={show_bytes(budget)}: cannot be kept; the smallest that can is {shown}, with "
            f"{show_levers(least.levers)} "
            f"({show_bytes(least.standing.total)} of it stand for the whole run); raise it, {', '.join(remedies)}"
        )


def show_levers(levers: Levers) -> str:
    """One line: only what departs from one piece per stream without recomputation, and packing."""
    parts = [f"checkpoint_blocks {levers.checkpoint_blocks}"]
    sizes = set(levers.piece_tokens.values())
    if len(sizes) == 1:
        parts.append(f"piece_tokens {sizes.pop()}")
    elif sizes:
        parts.append("piece_tokens " + ", ".join(f"{name} {size}" for name, size in levers.piece_tokens.items()))
    else:
        parts.append("one piece per stream")
    if levers.kl_chunk_rows:
        parts.append(f"kl_chunk_rows {levers.kl_chunk_rows}")
    parts += ["streams merged"] if levers.merge_streams == "on" else []
    parts += [name for name in ("offload_checkpoints", "offload_embedding") if getattr(levers, name)]
    return "; ".join([*parts, f"packing {levers.packing}"])


def show_plan(plan: Plan) -> str:
    """One line for the start of a run."""
    within = f" of {show_bytes(plan.budget)}" if plan.budget else ""
    return "; ".join([f"memory: {show_bytes(plan.total)}{within} planned", show_levers(plan.levers), *plan.notes])


def choose_levers(config: Config, budget: int | None, device: torch.device, limits: Limits | None = None) -> Levers:
    """The fastest levers under ``budget`` bytes on ``device``; None gives the recipe's own.

    Raises:
        UserError: the budget cannot be kept.
    """
    return Planner(config, device, limits=limits).plan(budget).levers


def plan_of(config: Config, device: torch.device, limits: Limits | None = None) -> Plan | None:
    """The plan for ``config.memory.budget`` on ``device``; None where no budget is set.

    Raises:
        UserError: a budget that is no size, or that cannot be kept.
    """
    budget = budget_bytes(config.memory.budget, device)
    return None if budget is None else Planner(config, device, limits=limits).plan(budget)
