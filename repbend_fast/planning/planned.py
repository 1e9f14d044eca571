"""One run's plan for one card: in words, and as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NotRequired, TypedDict

import torch

from repbend_fast.config import Config
from repbend_fast.models.load import resolve_device
from repbend_fast.planning.budget import budget_bytes, parse_budget, show_bytes
from repbend_fast.planning.cards import EFFICIENCY, Card, card_of, find_card
from repbend_fast.planning.planner import Plan, Planner, show_levers


class PlannedRow(TypedDict):
    """A plan as plain values. One for a budget that is too small has ``levers`` None, and the smallest that does."""

    model: str
    quantization: str
    device: NotRequired[str]
    card: str
    budget_bytes: int | None
    levers: dict[str, Any] | None
    standing_bytes: NotRequired[dict[str, int]]
    stream_bytes: NotRequired[dict[str, int]]
    total_bytes: NotRequired[int]
    flops_per_step: NotRequired[dict[str, float]]
    tokens_per_step: NotRequired[float]
    seconds_per_step: NotRequired[float | None]
    limit: NotRequired[str]
    notes: NotRequired[list[str]]
    smallest_bytes: NotRequired[int]
    smallest_levers: NotRequired[dict[str, object]]


@dataclass(frozen=True)
class PlannedRun:
    """What a run of ``config`` would do and take on ``card``, planned and not measured.

    ``plan`` has the levers, the bytes of everything that stands in memory, each stream's peak, FLOPs, tokens and
    seconds of an optimizer step, and what limits it.
    """

    config: Config
    card: Card
    device: torch.device
    plan: Plan

    @property
    def total_bytes(self) -> int:
        """The peak: the largest stream on top of what stands."""
        return self.plan.total

    @property
    def seconds_per_step(self) -> float | None:
        """Expected seconds of an optimizer step; None where no rate is known, as on a CPU."""
        return self.plan.seconds if self.device.type == "cuda" else None

    def as_dict(self) -> PlannedRow:
        """Plain values: bytes, FLOPs and seconds per optimizer step, the levers, what limits it."""
        plan = self.plan
        return {
            "model": self.config.model.name,
            "quantization": self.config.model.quantization,
            "device": self.device.type,
            "card": self.card.name,
            "budget_bytes": plan.budget,
            "levers": plan.levers.as_dict(),
            "standing_bytes": asdict(plan.standing),
            "stream_bytes": dict(plan.streams),
            "total_bytes": plan.total,
            "flops_per_step": dict(plan.flops),
            "tokens_per_step": plan.tokens,
            "seconds_per_step": self.seconds_per_step,
            "limit": plan.limit,
            "notes": list(plan.notes),
        }

    def lines(self) -> list[str]:
        """The plan in words, its notes first."""
        config, plan, stays = self.config, self.plan, self.plan.standing
        on_cuda = self.device.type == "cuda"
        budget = f"budget {show_bytes(plan.budget)}" if plan.budget else "no budget"
        lines = [f"note: {note}" for note in plan.notes]
        lines.append(
            f"{config.model.name} ({config.model.quantization}) on {self.card.name}, {budget}; planned, not measured"
        )
        lines += ["levers", f"  {show_levers(plan.levers)}", "memory at the longest lengths"]
        parts = {
            "base model": stays.weights,
            "adapter": stays.adapter,
            "gradients": stays.gradients,
            "optimizer": stays.optimizer,
        }
        parts["CUDA context" if on_cuda else "best adapter"] = stays.other
        parts |= {f"step, {name} stream": size for name, size in plan.streams.items()}
        width = max(map(len, parts))
        lines += [f"  {name:<{width}}  {show_bytes(size):>9}" for name, size in parts.items() if size]
        reserve = " and the reserve for fragmentation" if on_cuda else ""
        lines.append(
            f"  {'peak':<{width}}  {show_bytes(plan.total):>9}  the largest stream{reserve} on top of the rest, "
            "once the model is there"
        )
        lines.append(
            "loading is not planned: while weights are read, dequantised or merged, the process may hold more for a "
            "moment"
        )
        lines.append(f"FLOPs per optimizer step, {plan.tokens:.0f} tokens at published lengths")
        lines += [f"  {name:<{width}}  {value / 1e12:9.2f} T" for name, value in plan.flops.items()]
        lines.append(f"  {'all':<{width}}  {sum(plan.flops.values()) / 1e12:9.2f} T")
        if on_cuda:
            rate = f"{plan.seconds:.1f} s per optimizer step, {plan.tokens / plan.seconds:.0f} tokens/s"
            lines.append(f"expected  {rate}, taking {EFFICIENCY:.0%} of the tensor rate as reached")
        lines.append(f"limited by  {plan.limit}")
        return lines


def planned_run(config: Config, card_name: str | None = None) -> PlannedRun:
    """Plan ``config`` for the card of that name, else for the device that it names.

    The budget is the recipe's; ``auto``, or none for a named card, is the card's own memory.

    Raises:
        UserError: an unknown card, a model that cannot be planned, or a budget that cannot be kept.
    """
    if card_name is None:
        device = resolve_device(config.model.device)
        card = card_of(device)
    else:
        card = find_card(card_name)
        device = torch.device(card.kind)
    text = config.memory.budget
    by_card = card_name is not None and card.memory and (text is None or parse_budget(text) is None)
    budget = card.memory if by_card else budget_bytes(text, device)
    return PlannedRun(config, card, device, Planner(config, device, card).plan(budget))
