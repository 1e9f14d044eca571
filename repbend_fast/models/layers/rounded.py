"""A model with the weights of its blocks' linear layers rounded to few bits, with or without its adapter merged in.

Weights are changed in place, layer by layer, and come back to the bit: what they were waits in host memory, or on disk
where the model itself is in host memory. So the device holds the model and, for a moment, one layer more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.layers.stacked import outer_linears
from repbend_fast.models.layers.switches import reference_model
from repbend_fast.models.load import NF4_BLOCK

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class Place:
    """Whose weights they are: ``layer``, by name within decoder block number ``block`` of ``blocks``."""

    layer: str
    block: int
    blocks: int


Round = Callable[[Tensor, Place], Tensor | None]
"""The nearest weights that a format can hold, in the dtype and shape of those given; None where it cannot hold them."""


@dataclass
class Rounded:
    """Weights of the blocks' matrices: how many there are, and how many were rounded."""

    weights: int = 0
    rounded: int = 0


def nf4(weight: Tensor, double_quantization: bool = True) -> Tensor:
    """As bitsandbytes' 4-bit layers hold it: blocks of 64 weights in the order in which they lie, whatever the width.

    ``double_quantization``: the blocks' scales are rounded to 8 bits too, as QLoRA does.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    flat = weight.reshape(-1)
    # Rows of one block: on the CPU bitsandbytes lets every row begin a block. Zeros at the end change no scale.
    rows = pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK).contiguous()
    packed, state = quantize_4bit(rows, blocksize=NF4_BLOCK, compress_statistics=double_quantization, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(-1)[: flat.numel()].view(weight.shape).to(weight.dtype)


@contextmanager
def rounded_weights(
    model: CausalLM, blocks: nn.ModuleList, rounding: Round, *, adapter: bool, folder: Path | None = None
) -> Iterator[Rounded]:
    """The model with its blocks' linear layers through ``rounding``.

    Args:
        blocks: the decoder blocks of ``model``. Embedding, head and norms stay as they are, and so do experts that are
            parameters.
        adapter: merge the active adapter first; False leaves it out.
        folder: where weights wait on disk; None is the system's folder for temporary files.

    Raises:
        UserError: weights that are quantised already, an adapter that is merged already or has no merge, or no room for
            the weights that wait.
    """
    found = Rounded()
    with ExitStack() as stack:
        if not adapter:
            stack.enter_context(reference_model(model))
        keep = stack.enter_context(_kept_originals(folder))
        for number, block in enumerate(blocks):
            found.weights += sum(p.numel() for n, p in block.named_parameters() if p.dim() > 1 and ".lora_" not in n)
            for name, layer in outer_linears(block):
                linears = _linears(layer, name)
                for linear in linears:
                    _keep(stack, keep, linear)
                if adapter and hasattr(layer, "merge"):
                    _merge(stack, cast("BaseTunerLayer", layer), name)
                found.rounded += sum(_round(linear, rounding, Place(name, number, len(blocks))) for linear in linears)
        yield found


def _linears(layer: nn.Module, name: str) -> list[nn.Linear]:
    """The layer's own weights, below whatever wraps it."""
    if getattr(layer, "merged_adapters", None):
        raise UserError(f"rounding: the adapter on {name} is merged already; load model and adapter anew")
    base = cast("BaseTunerLayer", layer).get_base_layer() if hasattr(layer, "get_base_layer") else layer
    found = [cast(nn.Linear, module) for module in base.modules() if isinstance(module, nn.Linear | Conv1D)]
    for linear in found:
        if not linear.weight.is_floating_point():
            raise UserError(
                f"rounding: {name} is quantised already; load the model with model.quantization=none to see what "
                "rounding undoes"
            )
    return found


def _merge(stack: ExitStack, layer: BaseTunerLayer, name: str) -> None:
    try:
        layer.merge()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(f"rounding: the adapter on {name} cannot be merged ({one_line(error)})") from error
    stack.callback(layer.merged_adapters.clear)


@torch.no_grad()
def _round(linear: nn.Linear, rounding: Round, place: Place) -> int:
    weight = linear.weight.detach()
    weight = weight.T if isinstance(linear, Conv1D) else weight  # formats share scales along inputs
    values = rounding(weight.contiguous(), place)
    if values is None:
        return 0
    weight.copy_(values)
    return linear.weight.numel()


Keep = Callable[[Tensor], Callable[[], Tensor]]


@contextmanager
def _kept_originals(folder: Path | None) -> Iterator[Keep]:
    """Gives a function that puts a tensor away and gives one that brings it back."""
    with tempfile.TemporaryDirectory(prefix="rounding-", dir=folder, ignore_cleanup_errors=True) as place:
        count = 0

        def keep(values: Tensor) -> Callable[[], Tensor]:
            nonlocal count
            if values.device.type != "cpu":
                return partial(_same, values.detach().to("cpu", copy=True))
            path = Path(place) / f"{count}.safetensors"
            count += 1
            try:
                save_file({"values": values.detach().contiguous()}, path)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{place}: no room for the weights while they are rounded ({one_line(error)})"
                ) from error
            return lambda: load_file(path)["values"]

        yield keep


def _same(values: Tensor) -> Tensor:
    return values


def _keep(stack: ExitStack, keep: Keep, linear: nn.Linear) -> None:
    """Put away what merging and rounding change; leaving ``stack`` puts it back."""
    for parameter in linear.parameters(recurse=False):
        stack.callback(_put_back, parameter, keep(parameter))


@torch.no_grad()
def _put_back(parameter: nn.Parameter, original: Callable[[], Tensor]) -> None:
    parameter.copy_(original())
