"""Fake tensors that this project takes for CUDA ones: its CUDA branches run without a GPU, and without a result.

Inside :func:`pretended_cuda` a fake tensor answers ``device`` and ``is_cuda`` to callers in ``repbend_kernels`` and
``repbend_fast`` as a CUDA tensor would; torch itself goes on seeing the CPU, since autograd on fake CUDA tensors needs
a CUDA build. No Triton kernel runs: whoever asked is told of each launch instead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PROJECT = ("repbend_kernels", "repbend_fast")
CUDA = torch.device("cuda", 0)
CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
"""Of the card that is pretended: an H100."""

Launched = Callable[[Callable[..., object], dict[str, Tensor]], None]
"""Told of a kernel's Python function, and of the tensors that it is given, by parameter."""


@contextmanager
def pretended_cuda(launched: Launched) -> Iterator[None]:
    """For the calls inside, fake tensors are CUDA tensors to the project, and Triton's launches go to ``launched``."""
    from triton.runtime import autotuner, interpreter, jit

    def run(kernel: object, *args: object, grid: object = None, warmup: bool = False, **kwargs: object) -> None:
        function = _python_function(kernel)
        given = dict(zip(inspect.signature(function).parameters, args)) | kwargs
        launched(function, {name: value for name, value in given.items() if isinstance(value, Tensor)})

    properties = SimpleNamespace(
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
        name="pretended",
        total_memory=80 * 10**9,
    )
    with ExitStack() as patches:
        for target, name, value in (
            (FakeTensor, "device", property(_device)),
            (FakeTensor, "is_cuda", property(_is_cuda)),
            (jit.JITFunction, "run", run),
            (autotuner.Autotuner, "run", run),
            (interpreter.InterpretedFunction, "run", run),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
        ):
            patches.enter_context(patch.object(target, name, value, create=name == "is_cuda"))
        yield


def on_the_cpu(kwargs: dict[str, object]) -> dict[str, object]:
    """An operation's arguments with the pretended device taken back."""
    device = kwargs.get("device")
    if isinstance(device, torch.device) and device.type == "cuda":
        return kwargs | {"device": torch.device("cpu")}
    return kwargs


_real_device = cast(property, FakeTensor.device)


def _device(self: FakeTensor) -> torch.device:
    return CUDA if _asked_by_the_project() else _real_device.__get__(self)


def _is_cuda(self: FakeTensor) -> bool:
    return _asked_by_the_project()


def _asked_by_the_project() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] in PROJECT


def _python_function(kernel: object) -> Callable[..., object]:
    while not inspect.isfunction(kernel):
        kernel = getattr(kernel, "fn", None)
        assert kernel is not None
    return kernel
