"""What a device can do: rates for expected times, and the memory that a process there cannot have.

Tensor rates are dense bf16 products with float32 sums; bandwidths are of the card's own memory. Sources: NVIDIA's A100
and H100 (SXM) data sheets, the GA102 white paper (RTX 3090), the Ada white paper (RTX 4090); RTX 3060, 4060 and 4070 Ti
SUPER from their product pages' cores and boost clock, four dense tensor products with float32 sums per core and clock
as on the larger cards of their generation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from repbend_fast.errors import UserError

GB = 10**9
GIB = 2**30

EFFICIENCY = 0.55
"""Assumed share of the tensor rate that a step's matrix products reach; an assumption, not a measurement."""

CUDA_CONTEXT = 600 * 2**20
"""Bytes that a process holds on a CUDA device outside of torch's allocator: context, loaded kernels, cuBLAS
workspaces. An assumption.
"""

BARE_CONTEXT = 200 * 2**20
"""Bytes of those that are gone as soon as a process has asked a CUDA device how much is free. An
assumption, on the low side.
"""

FRAGMENTATION = 0.05
"""Share of the step's own peak (not of the weights) that the caching allocator is taken to lose to fragmentation."""


@dataclass(frozen=True)
class Card:
    """``memory`` in bytes, ``rate`` in FLOP/s, ``bandwidth`` and ``host`` (to and from host memory, one way) in
    bytes/s.
    """

    name: str
    memory: int
    rate: float
    bandwidth: float
    host: float
    kind: str = "cuda"


CARDS: dict[str, Card] = {
    "4060": Card("RTX 4060 8 GB", 8 * GB, 30.2e12, 272e9, 16e9),
    "3060": Card("RTX 3060 12 GB", 12 * GB, 25.5e12, 360e9, 32e9),
    "4070tis": Card("RTX 4070 Ti SUPER 16 GB", 16 * GB, 88.2e12, 672e9, 32e9),
    "3090": Card("RTX 3090 24 GB", 24 * GB, 71e12, 936e9, 32e9),
    "4090": Card("RTX 4090 24 GB", 24 * GB, 165.2e12, 1008e9, 32e9),
    "a100": Card("A100 80 GB", 80 * GB, 312e12, 2039e9, 32e9),
    "h100": Card("H100 80 GB", 80 * GB, 989e12, 3350e9, 64e9),
}

CPU = Card("CPU", 0, 1e11, 2e10, 1e10, kind="cpu")
"""Stands for any CPU: the rates only weigh levers against each other there, and no time is promised from them."""


def find_card(name: str) -> Card:
    """The card that ``name`` (``4090``, ``RTX 4070 Ti SUPER``, ``cpu``) means.

    Raises:
        UserError: no such card in the table.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        return CPU
    for key, card in CARDS.items():
        if wanted in (key, _plain(card.name), _plain(card.name.rsplit(" ", 2)[0])):
            return card
    raise UserError(f"--card {name}: not in the table; it has cpu, {', '.join(CARDS)}")


def card_of(device: torch.device) -> Card:
    """The table's card for a device of this machine; for one that it does not have, the rates of the RTX 3090."""
    if device.type != "cuda":
        return CPU
    if torch.cuda.is_available():
        own = _plain(torch.cuda.get_device_name(device))
        for card in CARDS.values():
            if _plain(card.name.rsplit(" ", 2)[0]) in own:
                return card
    return CARDS["3090"]


def free_memory(device: torch.device) -> int:
    """Bytes that ``memory.budget: auto`` may use: what is free on a CUDA device, nine tenths of the RAM that is free
    elsewhere.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free * 9 // 10


def _plain(name: str) -> str:
    return "".join(
        c for c in name.lower().replace("super", "s").replace("nvidia", "").replace("geforce", "") if c.isalnum()
    ).removeprefix("rtx")
