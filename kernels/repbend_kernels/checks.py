"""Argument checks of the public functions. Each names the argument, what was expected and what came; none reads device
memory.

The only check that reads values, the range of row and target indices, runs in debug mode alone (:func:`set_debug`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .selection import debug_enabled

KINDS = ("l2", "cosine", "relu_cosine", "mse")
REDUCTIONS = ("mean", "sum")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, which an operation's body is run under like any other code. Entered only where it is on: that costs
    as much as a small operation.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def check_float(name: str, tensor: Tensor) -> None:
    """``tensor`` is a floating tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    # Known by its name: torch.distributed is imported by those who use it.
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass .to_local() of hidden states, .full_tensor() of a "
            "weight"
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_states(name: str, tensor: Tensor) -> None:
    """``tensor`` is [..., D] with at least two dimensions and D ≥ 1."""
    check_float(name, tensor)
    if tensor.dim() < 2 or tensor.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected shape [..., D] with at least two dimensions and D >= 1, got {list(tensor.shape)}"
        )


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` has dtype and device of ``other``."""
    check_float(name, tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name} has, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """``tensor`` lies on the device of ``other``."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name} has, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """``tensor`` has exactly ``shape``."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {list(tensor.shape)}")


def check_constant(name: str, tensor: Tensor | None) -> None:
    """``tensor`` requires no gradient: the ops give none to it, and silence would train on a wrong one."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient (this op gives it none); detach it")


def check_indices(
    name: str, indices: Tensor, count: int, other_name: str, other: Tensor, ignored: int | None = None
) -> None:
    """``indices`` is int64 [R] on the device of ``other``; in debug mode also 0 <= index < ``count``, or
    ``ignored``.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name}: expected an int64 tensor of shape [R], got {got}")
    check_device(name, indices, other_name, other)
    if not debug_enabled():
        return
    if ignored is not None:
        indices = indices[indices != ignored]
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= count:
            raise IndexError(f"{name}: expected indices in 0 … {count - 1}, got {low} … {high}")


def check_unique(name: str, indices: Tensor) -> None:
    """In debug mode: no index occurs twice."""
    if debug_enabled() and indices.unique().numel() != indices.numel():
        raise ValueError(f"{name}: expected unique indices, got repeated ones")


def check_first_derivative(name: str) -> None:
    """Nobody differentiates this backward: what it returns carries no graph, and silence would make a second derivative
    0.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: no second derivatives, which create_graph=True asks for; use implementation='eager'"
        )


def check_positive(name: str, value: float) -> None:
    """``value`` is a finite number > 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
