"""Inputs of adapted layers that backward computes again instead of keeping them.

LoRA's gradient of A needs the layer's input x (``layers.lora``). Mostly a norm or a gated product has just made x from
tensors that backward keeps anyway, and making it again costs a few passes over it. Such a tensor carries its origin;
the adapted layers that read it keep the origin's inputs, which their owners keep too, in place of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_repbend_origin"


class Recomputation:
    """One tensor that ``readers`` layers read: computed by the first that asks in backward, given up by the last.

    It holds no tensor between passes, so that recomputed blocks, whose saved tensors come and go, can hold it.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.readers = 0
        self._make = make
        self._left = 0
        self._made: Tensor | None = None

    def read(self, inputs: Sequence[Tensor]) -> Tensor:
        """The tensor, from what the reader kept of its origin's inputs."""
        if self._made is None:
            self._left = self.readers
            with torch.no_grad():
                self._made = self._make(*inputs)
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: ``inputs``, detached, and what makes it of them."""

    inputs: tuple[Tensor, ...]
    recomputation: Recomputation
    version: int


def recomputable(make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``make(*inputs)``, which knows its origin where there will be a backward.

    Args:
        make: gives equal bits for equal inputs, under autocast or not. Unless it keeps ``inputs`` for its own backward
            nothing is saved.
    """
    made = make(*inputs)
    if made.requires_grad:
        setattr(made, _ATTRIBUTE, Origin(tuple(t.detach() for t in inputs), Recomputation(make), made._version))
    return made


def origin_of(x: Tensor) -> Origin | None:
    """The origin of ``x`` itself (views of it have none); None where it is unknown or ``x`` was changed in
    place since.
    """
    origin: Origin | None = getattr(x, _ATTRIBUTE, None)
    return origin if origin is not None and origin.version == x._version else None
