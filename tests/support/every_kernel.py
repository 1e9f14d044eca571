"""Launches every Triton kernel once or more, at small odd sizes: the program that compute-sanitizer watches.

    python tests/support/every_kernel.py                        # on the GPU; TRITON_INTERPRET=1 without one

Prints ``launched NAME`` for each kernel. Numbers are checked elsewhere.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import op_calls
import repbend_kernels
import torch
from kernel_compare import spread
from repbend_kernels import (
    bend_tap,
    implementation,
    keyed_dropout,
    linear_kl_div,
    linear_log_prob,
    lora_down,
    pairwise_cosine,
    window_distance,
)
from repbend_kernels.blocks import Nf4Scales, dequantize_nf4, row_hashes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernels() -> dict[str, list[ModuleType]]:
    """Every kernel of the package by name, with the modules that know it: one of them launches it."""
    folder = Path(repbend_kernels.__file__).parent / "triton"
    modules = [
        importlib.import_module(f"repbend_kernels.triton.{path.stem}") for path in sorted(folder.glob("[!_]*.py"))
    ]
    found: dict[str, list[ModuleType]] = {}
    for module in modules:
        for name in vars(module):
            if name.endswith("_kernel"):
                found.setdefault(name, []).append(module)
    return found


class Noticed:
    """A kernel that says when it is launched."""

    def __init__(self, name: str, kernel: Any, launched: set[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.add(self.name)
        return self.kernel[grid]


def wide_calls(dtype: torch.dtype) -> None:
    """Rows wider than one block of each kernel, in views with gaps, so that every loop and tail runs."""
    hidden = spread((2, 5, 9001), dtype, DEVICE, 1)[..., :9000].requires_grad_()
    reference, rows = spread((4, 9000), dtype, DEVICE, 2), torch.tensor([1, 9, 4, 6], device=DEVICE)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]], device=DEVICE)
    losses = []
    for kind in ("l2", "cosine"):
        losses.append(bend_tap(hidden * 1, reference.clone(), rows, kind=kind)[1])
        losses.append(window_distance([hidden], [torch.zeros_like(hidden)], mask, kind=kind))
    losses.append(pairwise_cosine(hidden))
    losses.append(keyed_dropout(hidden.reshape(10, 9000), torch.arange(10, device=DEVICE), 3, 0.3).float().sum())
    torch.stack([loss.float() for loss in losses]).sum().backward()
    states, weight = spread((5, 33), dtype, DEVICE, 3).requires_grad_(), spread((5003, 33), dtype, DEVICE, 4)
    targets = torch.tensor([0, 5002, 7, 4096, 2047], device=DEVICE)
    for softcap in (None, 5.0):
        loss = linear_kl_div(states, spread((5, 33), dtype, DEVICE, 5), weight, softcap=softcap, chunk_rows=2)
        (loss + linear_log_prob(states, weight, targets, softcap=softcap).sum()).backward()
    shared_calls(dtype)


def shared_calls(dtype: torch.dtype) -> None:
    """Adapters that read one tensor, and a weight in 4 bits with scales of either kind."""
    x, hashes = spread((70, 96), dtype, DEVICE, 6).requires_grad_(), row_hashes(torch.arange(70, device=DEVICE))
    downs = [spread((rank, 96), dtype, DEVICE, rank).requires_grad_() for rank in (5, 8)]
    _, products = lora_down(x, downs, hashes, 3, 0.3)
    torch.stack([product.float().sum() for product in products]).sum().backward()
    packed = torch.arange(40 * 96 // 2, device=DEVICE).to(torch.uint8)
    table, levels = spread((16,), torch.float32, DEVICE, 7), torch.arange(60, device=DEVICE)
    number = torch.tensor(0.5, device=DEVICE)
    two_level = Nf4Scales(levels.to(torch.uint8), spread((256,), torch.float32, DEVICE, 8), number[None], number)
    for scales in (Nf4Scales(levels.float()), two_level):
        dequantize_nf4(packed, table, scales, (40, 96), dtype)


def main() -> None:
    """Runs every small call and the wide ones in two dtypes."""
    launched: set[str] = set()
    found = kernels()
    for name, modules in found.items():
        for module in modules:
            setattr(module, name, Noticed(name, getattr(module, name), launched))
    for name, value in vars(op_calls).items():
        if isinstance(value, torch.Tensor):
            setattr(op_calls, name, value.to(DEVICE))
    op_calls.LAYERS = [layer.to(DEVICE) for layer in op_calls.LAYERS]
    with implementation("triton"):
        for call in op_calls.CALLS.values():
            call(spread((2, 3, 8), torch.float32, DEVICE, 1).requires_grad_()).backward()
        for dtype in (torch.float32, torch.bfloat16):
            wide_calls(dtype)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for name in sorted(launched):
        print(f"launched {name}")
    for name in sorted(set(found) - launched):
        print(f"not launched {name}")


if __name__ == "__main__":
    main()
