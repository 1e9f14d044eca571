"""A direction taken out of what a model's blocks read and write, by hooks: the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.switches import input_through, output_through


@contextmanager
def projected_out(model: CausalLM, direction: Tensor) -> Iterator[None]:
    """While entered, ``h − (h·u) u`` stands for ``h``, u being ``direction`` [D] at length 1, at every block's input
    and output and at what its attention and its MLP give.

    The first block's input is the embedding. A block's norms are left alone: they are read through weights, and what
    one adds to the stream the block's output loses again.

    Raises:
        ValueError: the direction is zero or not finite.
    """
    unit = direction.detach().to(torch.promote_types(torch.float32, direction.dtype))
    length = torch.linalg.vector_norm(unit)
    if not bool(torch.isfinite(length)) or float(length) == 0:
        raise ValueError("a direction has to be finite and longer than 0")
    unit = unit / length

    def change(hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != len(unit):
            return hidden
        wide = hidden.to(unit.dtype)
        along = unit.to(hidden.device)
        return (wide - (wide @ along).unsqueeze(-1) * along).to(hidden.dtype)

    with ExitStack() as hooks:
        for block in find_decoder(model).layers:
            hooks.enter_context(input_through(block, change))
            for part in writing_parts(block):
                hooks.enter_context(output_through(part, _of_first(change)))
            hooks.enter_context(output_through(block, _of_first(change)))
        yield


def writing_parts(block: nn.Module) -> list[nn.Module]:
    """The direct parts of a block that write into the stream: attention or another mixer, MLP or experts."""
    return [part for part in block.children() if "norm" not in type(part).__name__.lower()]


def _of_first(change: Callable[[Tensor], Tensor]) -> Callable[[object], object]:
    """``change`` for modules that give a tensor, or a tuple that begins with one."""

    def changed(output: object) -> object:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        return output

    return changed
