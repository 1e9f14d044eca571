"""The stand-ins of one truncated, tapped pass: a shortened list of wrapped blocks, and a final norm that may be left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from repbend_fast.ranges import CHECKPOINTED

Visit = Callable[[int, Tensor], Tensor]
"""``visit(l, hidden[B, T, D]) -> hidden``: called once, in order, for each hidden state l ≥ 0 that the pass reaches."""


class TappedBlock(nn.Module):
    """One decoder block for one pass: block, optionally recomputed in backward, then the visit outside of the
    recomputed region.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        visit: Visit,
        *,
        last: bool,
        recompute: bool,
        offload: OffloadedInputs | None,
    ) -> None:
        super().__init__()
        self.block = block
        self._index = index
        self._visit = visit
        # The output of the last block is no hidden state: the last hidden state is read after the norm.
        self._last = last
        self._recompute = recompute
        self._offload = offload

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: object, **kwargs: Any) -> object:
        if self._index == 0:
            hidden = self._visit(0, hidden)
        if self._recompute and torch.is_grad_enabled():
            source = _Input(self._index, hidden, self._offload)
            del hidden
            # No generator's state decides anything in a block: LoRA's dropout follows keys, a model's own is off.
            output = checkpoint(self._run, source, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            output = self.block(hidden, *args, **kwargs)
        if self._last:
            return output
        if isinstance(output, tuple | list):
            return type(output)((self._visit(self._index + 1, output[0]), *output[1:]))
        return self._visit(self._index + 1, output)

    def _run(self, source: _Input, *args: object, **kwargs: object) -> object:
        with record_function(CHECKPOINTED):
            return self.block(source.take(), *args, **kwargs)


class Blocks(Protocol):
    """What is read of ``models.decoder.Decoder``."""

    @property
    def body(self) -> nn.Module: ...

    @property
    def norm_name(self) -> str | None: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def place(self) -> tuple[nn.Module, str]: ...


class OffloadedInputs(Protocol):
    """Where inputs of recomputed blocks wait: ``layers.offload.HostStates``."""

    def put(self, index: int, hidden: Tensor) -> None:
        """Take a copy of the input of block ``index``."""

    def get(self, index: int) -> Tensor:
        """The input of block ``index``, a leaf on the device."""


class _Input:
    """The input of a recomputed block: kept, or with ``offload`` given up at the first run and fetched for the second.

    Checkpointing keeps its arguments alive, so the tensor itself must not be one.
    """

    def __init__(self, index: int, hidden: Tensor, offload: OffloadedInputs | None) -> None:
        self._index, self._offload = index, offload
        self._hidden: Tensor | None = hidden

    def take(self) -> Tensor:
        """The input, for forward and for the recomputation."""
        if self._hidden is None:
            assert self._offload is not None
            return self._offload.get(self._index)
        hidden = self._hidden
        if self._offload is not None:
            self._offload.put(self._index, hidden)
            self._hidden = None
        return hidden


class _LeftOutNorm(nn.Module):
    """The final norm of a truncated pass: itself until the blocks have run, since a family may use it before them too,
    then nothing.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.left_out = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        return hidden if self.left_out else self.norm(hidden, *args, **kwargs)


@contextmanager
def truncated(
    decoder: Blocks,
    stop: int,
    visit: Visit,
    checkpoint_blocks: int,
    offload: OffloadedInputs | None,
) -> Iterator[None]:
    """While entered, the decoder's list of blocks ends before hidden state ``stop`` and visits each; the arguments are
    those of ``run_decoder``.
    """
    body, norm_name, layers = decoder.body, decoder.norm_name, decoder.layers
    holder, list_name = decoder.place
    total = len(layers)
    norm = None if norm_name is None or stop == total else _LeftOutNorm(getattr(body, norm_name))
    if norm is not None:
        visit = _then_leave_out(norm, stop, visit)
    wrapped = [
        TappedBlock(layers[i], i, visit, last=i + 1 == total, recompute=i < checkpoint_blocks, offload=offload)
        for i in range(min(stop, total))
    ]
    try:
        setattr(holder, list_name, nn.ModuleList(wrapped))
        if norm is not None:
            setattr(body, str(norm_name), norm)
        yield
    finally:
        setattr(holder, list_name, layers)
        if norm is not None:
            setattr(body, str(norm_name), norm.norm)


def _then_leave_out(norm: _LeftOutNorm, stop: int, visit: Visit) -> Visit:
    """``visit``, and at hidden state ``stop``, behind the last block that runs, the norm is switched off."""

    def visited(layer: int, hidden: Tensor) -> Tensor:
        norm.left_out = layer == stop
        return visit(layer, hidden)

    return visited
