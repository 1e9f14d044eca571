"""Fresh low-rank parts on top of a model's linear layers, whatever these are: plain, adapted by PEFT, or in NF4.

They live beside the model. While they are on, a layer gives ``layer(x) + factor · (x Aᵀ) Bᵀ``; nothing of the model is
read but its layers' shapes and places, and nothing of it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from repbend_fast.models.layers.switches import added_to


class _Transposed(Protocol):
    """What GPT-2's linear layer says of itself, whose weight is [inputs, outputs]."""

    nx: int
    nf: int


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, or of what wraps one; None of anything else."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    if isinstance(module, Conv1D):
        return cast(_Transposed, module).nx, cast(_Transposed, module).nf
    return None


def outer_linears(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer of a block. A layer that wraps another, as PEFT's do, counts instead of
    it.
    """
    for name, child in block.named_children():
        path = f"{prefix}{name}"
        if linear_sizes(child):
            yield path, child
        else:
            yield from outer_linears(child, f"{path}.")


@dataclass(frozen=True)
class _Part:
    """``a`` float32 [r, D], ``b`` float32 [O, r] on top of ``layer``."""

    layer: nn.Module
    a: nn.Parameter
    b: nn.Parameter


class StackedLora:
    """Low-rank parts with B = 0 on every linear layer of the decoder blocks.

    Products are made in the dtype of a layer's input; the parameters are float32, so that a small learning rate is not
    lost to rounding.

    Args:
        blocks: decoder blocks of the model.
        rank: r, for all layers.
        alpha: ``factor`` = alpha / r.
        seed: of A, which is drawn on the CPU and so is the same on every device.
    """

    def __init__(self, blocks: nn.ModuleList, rank: int, alpha: float, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.factor = alpha / rank
        self._parts: list[_Part] = []
        for block in blocks:
            for _, layer in outer_linears(block):
                # As PEFT draws it: Kaiming's uniform with a = √5, which is ± 1 / √D.
                inputs, outputs = cast("tuple[int, int]", linear_sizes(layer))
                bound = 1 / math.sqrt(inputs)
                a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=random)
                device = next(layer.parameters()).device
                b = torch.zeros(outputs, rank)
                self._parts.append(_Part(layer, nn.Parameter(a.to(device)), nn.Parameter(b.to(device))))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in a fixed order."""
        return [p for part in self._parts for p in (part.a, part.b)]

    def state(self) -> list[Tensor]:
        """Copies of the parameters in host memory."""
        return [p.detach().to("cpu", copy=True) for p in self.parameters]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Take over what ``state`` gave."""
        for parameter, values in zip(self.parameters, state, strict=True):
            parameter.copy_(values)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model with these parts inside; without them again after."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(added_to(part.layer, partial(self._product, part)))
            yield

    def _product(self, part: _Part, x: Tensor) -> Tensor:
        return linear(linear(x, part.a.to(x.dtype)), part.b.to(x.dtype)) * self.factor
