"""One small call of every public op, as a function of the one tensor that it differentiates, for tests that treat all
ops alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_compare import spread
from repbend_kernels import (
    TripletSums,
    bend_distance,
    bend_tap,
    gated_product,
    keyed_dropout,
    linear_kl_div,
    linear_log_prob,
    linear_lowered_label,
    lora_down,
    lora_up,
    pairwise_cosine,
    rms_norm,
    tap_rows,
    triplet_tap,
    window_distance,
)
from repbend_kernels.blocks import row_hashes
from torch import Tensor

CPU = torch.device("cpu")
ROWS = torch.tensor([4, 0, 3])
KEYS = torch.arange(6) * 7919 - 2**62
TARGETS = torch.tensor([5, 0, 11, 2, 2, 7])
MASK = torch.tensor([[True, False, True], [False, True, True]])


def _values(*shape: int, seed: int = 7) -> Tensor:
    return spread(shape, torch.float32, CPU, seed)


# Made once: a compiled call cannot make random numbers of its own, and those it may overwrite are cloned.
ROW_STATES, ONE_ROW, STATES, WEIGHT = _values(3, 8), _values(1, 8), _values(6, 8), _values(12, 8)
LAYERS = [_values(2, 3, 8, seed=3), _values(2, 3, 8, seed=4)]
HASHES, DOWN, UP, DIRECTION = row_hashes(KEYS), _values(2, 8), _values(8, 2), _values(8, 8)[0]


def _tap(hidden: Tensor, kind: str) -> Tensor:
    stream, loss = bend_tap(hidden * 1, ROW_STATES.clone(), ROWS, kind=kind)
    return (stream * 0.5).sum() + loss


def _rows(hidden: Tensor) -> Tensor:
    stream, copy = tap_rows(hidden * 1, ROWS)
    return (stream * 0.5).sum() + copy.square().sum()


def _window(hidden: Tensor, consume: bool) -> Tensor:
    return window_distance(
        [hidden * 1, hidden * 2], [reference.clone() for reference in LAYERS], MASK, consume_references=consume
    )


def _broadcast(hidden: Tensor) -> Tensor:
    stream, loss = bend_tap(hidden * 1, ONE_ROW, ROWS, kind="mse")
    return stream.sum() + loss


def _triplets(hidden: Tensor, part: bool) -> Tensor:
    sums = TripletSums(DIRECTION, (WEIGHT[0], WEIGHT[1])) if part else None
    halves = ROWS[:2], ROWS[2:]
    stream, loss, _ = triplet_tap(
        hidden * 1,
        ROW_STATES.clone(),
        halves,
        weights=(0.7, 1.3),
        margins=(2.0, 2.0),
        unsafe_rows=4 if part else None,
        sums=sums,
    )
    return (stream * 0.5).sum() + loss


def _low_rank(hidden: Tensor, hashes: Tensor | None) -> Tensor:
    x, down = lora_down(hidden.reshape(6, 8) * 1, DOWN, hashes, 3, 0.4)
    return lora_up(x @ WEIGHT[:8].T, down, UP, 1.5).square().sum()


# Every one takes [2, 3, 8].
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "bend_tap-l2": lambda h: _tap(h, "l2"),
    "bend_tap-cosine": lambda h: _tap(h, "cosine"),
    "bend_tap-broadcast": _broadcast,
    "tap_rows": _rows,
    "bend_distance": lambda h: bend_distance(h, ROW_STATES, ROWS, kind="relu_cosine"),
    "window_distance": lambda h: _window(h, False),
    "window_distance-consume": lambda h: _window(h, True),
    "pairwise_cosine": pairwise_cosine,
    "linear_kl_div": lambda h: linear_kl_div(h.reshape(6, 8), STATES, WEIGHT, temperature=2.0, softcap=3.0),
    "keyed_dropout": lambda h: keyed_dropout(h, KEYS, 3, 0.4).square().sum(),
    "triplet_tap": lambda h: _triplets(h, False),
    "triplet_tap-part": lambda h: _triplets(h, True),
    "rms_norm": lambda h: rms_norm(h, DIRECTION, 1e-5).square().sum(),
    "rms_norm-gemma": lambda h: rms_norm(h, DIRECTION, 1e-5, gemma=True).sum(),
    "gated_product": lambda h: gated_product(h, h * 2, "silu").sum(),
    "gated_product-gelu": lambda h: gated_product(h * 2, h, "gelu_tanh").sum(),
    "lora": lambda h: _low_rank(h, None),
    "lora-dropout": lambda h: _low_rank(h, HASHES),
    "linear_log_prob": lambda h: linear_log_prob(h.reshape(6, 8), WEIGHT, TARGETS, lengths=[2, 4]).sum(),
    "linear_lowered_label": lambda h: linear_lowered_label(
        h.reshape(6, 8), WEIGHT, TARGETS, lowered=4.0, reference=STATES, softcap=3.0
    ).sum(),
    "linear_lowered_label-own": lambda h: linear_lowered_label(
        h.reshape(6, 8), WEIGHT, TARGETS, lowered=float("inf")
    ).sum(),
}
