"""``memory.budget``: how much it is, and what of it stays taken during the whole of training."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from repbend_fast.config import Config
from repbend_fast.errors import UserError
from repbend_fast.models.adapters import trainable_parameters
from repbend_fast.models.causal import CausalLM
from repbend_fast.planning.cards import BARE_CONTEXT, CUDA_CONTEXT, FRAGMENTATION, GB, GIB, free_memory
from repbend_fast.planning.tracker import module_tensors, tensor_bytes

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "KIB": 2**10, "MIB": 2**20, "GIB": GIB}

# bitsandbytes keeps the states of smaller parameters in 32 bits, one scale for this many 8-bit values, and pages larger
# parameters only.
LEAST_8BIT, BLOCK_8BIT = 4096, 256
LEAST_PAGED = 100_000


def parse_budget(text: str) -> int | None:
    """Bytes of ``8GB``, ``7.5GiB`` or ``500MB``; None for ``auto``.

    Raises:
        UserError: not a size.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise UserError(f"memory.budget={text}: not a size; write for example 8GB, 7.5GiB, 500MB or auto")
    return size


def budget_bytes(text: str | None, device: torch.device) -> int | None:
    """The budget in bytes, ``auto`` being what is free on ``device`` now; None where no budget is set."""
    if text is None:
        return None
    size = parse_budget(text)
    if size is not None:
        return size
    # The context stands in every plan, and has left what is free already.
    return free_memory(device) + (BARE_CONTEXT if device.type == "cuda" else 0)


def show_bytes(size: float) -> str:
    """``7.93 GB``, with MB and bytes for what is smaller."""
    if size >= GB:
        return f"{size / GB:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size:.0f} B"


@dataclass(frozen=True)
class Standing:
    """Bytes that are taken from the first step to the last, by what takes them; ``step`` is what the optimizer's step
    adds for a moment.

    ``table``: embedding and head, the part of ``weights`` that ``memory.offload_embedding`` moves to the host.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    other: int
    step: int
    table: int = 0

    @property
    def total(self) -> int:
        """All but the optimizer's moment."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.other

    def without_table(self) -> Standing:
        """The same with embedding and head on the host."""
        return replace(self, weights=self.weights - self.table, table=0)


def standing(model: CausalLM, config: Config, device: torch.device) -> Standing:
    """What stays taken with ``model``, which may be on fake tensors.

    ``gradients`` are the accumulated ones; a piece makes its own apart from them, which is part of the piece's peak.
    ``other`` is the CUDA context, or on the CPU the best adapter's copy.
    """
    trained = trainable_parameters(model)
    adapter = tensor_bytes(trained)
    copies = adapter if device.type == "cpu" and config.validation.every else 0
    return Standing(
        weights=tensor_bytes(module_tensors(model)) - adapter,
        adapter=adapter,
        gradients=adapter,
        optimizer=_optimizer_bytes([p.numel() for p in trained], adapter, config.training.optimizer),
        other=CUDA_CONTEXT if device.type == "cuda" else copies,
        step=_moment_bytes(trained, adapter, config.training.optimizer, device),
        table=tensor_bytes([model.get_input_embeddings().weight, model.get_output_embeddings().weight]),
    )


def taken(stays: Standing, peak: int, device: torch.device) -> int:
    """The whole that a step with pieces of this ``peak`` takes, the reserve for fragmentation included."""
    peak = max(peak, stays.step)
    return stays.total + (int(peak * (1 + FRAGMENTATION)) if device.type == "cuda" else peak)


def _optimizer_bytes(sizes: list[int], adapter: int, optimizer: str) -> int:
    if optimizer == "adamw":
        return 2 * adapter
    total = 0
    for n in sizes:
        narrow = optimizer.endswith("8bit") and n >= LEAST_8BIT
        # What is paged lies in host memory, and the driver brings it in for the step; scales are not.
        if not (optimizer.startswith("paged") and n >= LEAST_PAGED):
            total += (2 if narrow else 8) * n
        if narrow:
            total += 2 * 4 * -(n // -BLOCK_8BIT)
    return total


def _moment_bytes(trained: list[nn.Parameter], adapter: int, optimizer: str, device: torch.device) -> int:
    """torch's AdamW works on all parameters at once on CUDA, with a temporary of their size, and on one at a time
    elsewhere.
    """
    if optimizer == "adamw" and device.type == "cuda":
        return adapter
    return 2 * max(p.numel() * p.element_size() for p in trained)
