"""Which implementation an op runs: one switch, and an error where the one asked for cannot run.

Order of precedence: the call's ``implementation=`` argument, then :func:`implementation` / :func:`set_implementation`,
then the environment variable ``REPBEND_KERNELS`` (read at import), then ``auto``.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton", "eager")


def _known(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return name


_selected: str = _known(os.environ.get("REPBEND_KERNELS", "auto") or "auto", "REPBEND_KERNELS")
_debug: bool = os.environ.get("REPBEND_KERNELS_DEBUG", "0") not in ("", "0")
_HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
# Triton decides at import whether a kernel is interpreted, so the variable counts only if it was set before.
_INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"


def set_implementation(name: str) -> None:
    """Choose for all later calls: ``auto`` (triton on CUDA, torch elsewhere), ``torch``, ``triton`` or ``eager``.

    Raises:
        ValueError: unknown name.
    """
    global _selected
    _selected = _known(name, "implementation")


def get_implementation() -> str:
    """The name that calls without ``implementation=`` use, before ``auto`` is resolved."""
    return _selected


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Choose for the calls inside a ``with`` block; see :func:`set_implementation`."""
    previous = _selected
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation(previous)


def set_debug(on: bool) -> None:
    """Check index ranges on every call. Off by default: on a GPU the check waits for the device
    (``REPBEND_KERNELS_DEBUG=1``).
    """
    global _debug
    _debug = bool(on)


def debug_enabled() -> bool:
    """Whether index ranges are checked."""
    return _debug


def resolve(name: str | None, tensor: Tensor) -> str:
    """The implementation that a call on ``tensor`` runs: ``torch``, ``triton`` or ``eager``.

    ``auto`` takes Triton for CUDA tensors in float32, bfloat16 and float16 where Triton is installed, and plain torch
    otherwise.

    Raises:
        ValueError: unknown name.
        RuntimeError: ``triton`` was asked for and cannot run on this tensor; forward-mode derivatives with another one
            than ``eager``.
    """
    chosen = _selected if name is None else _known(name, "implementation")
    # An op that has no forward-mode rule drops tangents, and the derivative would be 0.
    if chosen != "eager" and torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); use implementation='eager'"
        )
    if chosen == "auto":
        return "triton" if tensor.is_cuda and _HAS_TRITON and tensor.dtype != torch.float64 else "torch"
    if chosen == "triton":
        _require_triton(tensor)
    return chosen


def launches_alone(chosen: str, tensor: Tensor) -> bool:
    """Whether a kernel is launched without its op around it, which costs the host more than the launch: not where
    somebody traces the ops, or where a tensor on a GPU has no memory.
    """
    if chosen != "triton" or torch.compiler.is_compiling():
        return False
    # By its attribute: to import the class would import Triton and more.
    fake: torch.device | None = getattr(tensor, "fake_device", None)
    return fake is None or fake.type != "cuda"


def _require_triton(tensor: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError(
            "implementation='triton': the package triton is not installed; install it, or choose 'torch'"
        )
    if tensor.dtype == torch.float64:
        raise RuntimeError("implementation='triton': float64 runs on the torch path only; choose 'torch'")
    if not tensor.is_cuda and not (_INTERPRET and tensor.device.type == "cpu"):
        raise RuntimeError(
            f"implementation='triton': tensors are on {tensor.device.type}, expected cuda; choose 'torch', "
            "or start Python with TRITON_INTERPRET=1 to interpret the kernels on the CPU"
        )
