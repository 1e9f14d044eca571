"""Peak bytes of the tensors that a region of code holds, by category; real and fake tensors alike.

A dispatch mode sees every operation, counts each new storage once and lets it go when it is freed. What an operation
allocates and frees inside of itself is invisible to it: the ops that need much, and bitsandbytes' dequantisation, have
rules (``planning.scratch``).

``torch.distributed._tools.MemTracker`` does the like, but is a private module, patches every module's calls, and has no
place for what an op needs inside.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from repbend_fast.models.causal import CausalLM
from repbend_fast.planning.known_results import KnownResults

Scratch = Callable[[tuple[Any, ...]], int]
"""Bytes that one call of an operation needs inside, from its arguments."""


class MemoryTracker(TorchDispatchMode):
    """Context manager. Within it, ``live`` and ``peak`` are bytes of watched and newly made storages.

    Args:
        scratch: per operation name (``repbend_kernels::linear_kl_div``), the bytes of a call that no tensor shows.
        apart: operations whose scratch a lever decides: it stays out of ``peak``, and ``at_op`` is what it comes on top
            of.
        category: names the category of a new tensor, from the operation that made it; all are ``activations`` without
            it.
        known: results of operations on fake tensors that need not be asked of torch again.

    ``at_op`` is the most bytes held at any call of an operation of ``apart``, its results included; None if there was
    none.
    """

    def __init__(
        self,
        scratch: Mapping[str, Scratch] | None = None,
        apart: frozenset[str] = frozenset(),
        category: Callable[[str, Tensor], str] | None = None,
        known: KnownResults | None = None,
    ) -> None:
        super().__init__()
        self._call: Callable[..., object] = known.call if known is not None else _call
        self.live = 0
        self.peak = 0
        self.at_op: int | None = None
        self.peak_categories: Counter[str] = Counter()
        self._categories: Counter[str] = Counter()
        self._scratch = dict(scratch or {})
        self._apart = apart
        self._category = category
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}

    def watch(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of ``tensors`` as ``category``; those already counted move there."""
        for tensor in tensors:
            self._count(tensor, category, move=True)
        self._new_peak(0)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked twice for every operation on a fake tensor
        made = self._call(func, args, kwargs or {})
        name = func._schema.name
        for tensor in (made,) if isinstance(made, Tensor) else made if isinstance(made, (tuple, list)) else ():
            if isinstance(tensor, Tensor):
                self._count(tensor, self._category(name, tensor) if self._category else "activations")
        if name in self._apart:
            self.at_op = max(self.at_op or 0, self.live)
        inside = self._scratch.get(name)
        self._new_peak(inside(args) if inside is not None else 0)
        return made

    def _count(self, tensor: Tensor, category: str, move: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None:
            if move and known[2] != category:
                self._categories[known[2]] -= known[1]
                self._categories[category] += known[1]
                self._storages[key] = (known[0], known[1], category)
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, lambda _: self._free(key)), size, category)
        self._categories[category] += size
        self.live += size

    def _free(self, key: int) -> None:
        _, size, category = self._storages.pop(key)
        self._categories[category] -= size
        self.live -= size

    def _new_peak(self, scratch: int) -> None:
        if self.live + scratch > self.peak:
            self.peak = self.live + scratch
            self.peak_categories = self._categories.copy()
            self.peak_categories["scratch"] = scratch


def _call(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    made: object = func(*args, **kwargs)
    return made


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def module_tensors(module: torch.nn.Module | CausalLM) -> list[Tensor]:
    """Parameters and buffers of ``module``, and the scales of NF4 weights, which are neither."""
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        while state is not None:
            found += [t for t in (state.absmax, state.offset, state.code) if isinstance(t, Tensor)]
            state = state.state2
    return found
