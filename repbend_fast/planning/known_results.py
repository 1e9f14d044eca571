"""What an operation on fake tensors gives, known from an earlier call with arguments of the same form.

A step runs the same block over and over. torch's own cache of fake results is slow, since its key holds all that could
matter to any tensor (symbolic sizes, sparse layouts, memory formats, quantisation). The fake tensors of a plan are
strided and have plain sizes, and whatever else comes is left to torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)
"""Types of arguments that are no tensors and can be told apart by their value."""
MOST = 20_000
"""Results that are kept; beyond that all are forgotten."""


class _Form(NamedTuple):
    """A result. ``given``: the argument that it is, or whose storage it shares; None for a tensor of its own."""

    given: int | None
    itself: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Unknown(Exception):
    """These arguments cannot be told apart by their form."""


class KnownResults:
    """Calls operations on the fake tensors of ``mode``. Exact: a result has the sizes, strides and storage that torch
    gives it.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[tuple[object, ...], tuple[type, tuple[_Form | None, ...]] | None] = {}

    def call(self, func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """``func(*args, **kwargs)``."""
        key: list[object] = [func]
        given: list[Tensor] = []
        try:
            self._describe(args, key, given)
            for name, value in kwargs.items():
                key.append(name)
                self._describe(value, key, given)
        except _Unknown:
            return func(*args, **kwargs)
        if not any(type(tensor) is FakeTensor for tensor in given):
            return func(*args, **kwargs)
        place = tuple(key)
        if place in self._known:
            known = self._known[place]
            return func(*args, **kwargs) if known is None else self._made(*known, given)
        before = [_form(tensor) for tensor in given]
        made = func(*args, **kwargs)
        if len(self._known) >= MOST:
            self._known.clear()
        # An operation that resizes what it is given has no form.
        unchanged = all(_form(tensor) == form for tensor, form in zip(given, before))
        self._known[place] = _forms(func, made, given) if unchanged else None
        return made

    def _describe(self, value: object, key: list[object], given: list[Tensor]) -> None:
        kind = type(value)
        if isinstance(value, FakeTensor):
            if value.fake_mode is not self._mode or value.fake_device != CPU or value.constant is not None:
                raise _Unknown
            key.append(_form(value))
            given.append(value)
        elif isinstance(value, Tensor) and kind is Tensor and value.device == CPU and value.layout == torch.strided:
            # A real one beside fake ones: torch takes a fake one of its form in its place.
            key += ("real", _form(value))
            given.append(value)
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            for item in value:
                self._describe(item, key, given)
        elif kind in PLAIN:
            key += (kind, value)
        else:
            raise _Unknown

    def _made(self, kind: type, forms: tuple[_Form | None, ...], given: list[Tensor]) -> object:
        made = [None if form is None else self._one(form, given) for form in forms]
        return made[0] if kind is FakeTensor or kind is type(None) else kind(made)

    def _one(self, form: _Form, given: list[Tensor]) -> Tensor:
        if form.given is None:
            own = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
            return FakeTensor(self._mode, own, CPU)
        if form.itself:
            return given[form.given]
        view = torch.empty(0, dtype=form.dtype, device="meta")
        view.set_(given[form.given].untyped_storage(), form.offset, form.shape, form.stride)
        return FakeTensor(self._mode, view, CPU)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _forms(func: OpOverload, made: object, given: list[Tensor]) -> tuple[type, tuple[_Form | None, ...]] | None:
    """Of what a call gave; None where it cannot be made again from its form."""
    kind = type(made)
    if kind not in (FakeTensor, type(None), list, tuple):
        return None
    storages = [tensor.untyped_storage()._cdata for tensor in given]
    found: list[_Form | None] = []
    own: set[int] = set()
    for one in made if isinstance(made, (list, tuple)) else (made,):
        if one is None:
            found.append(None)
            continue
        if type(one) is not FakeTensor or one.fake_device != CPU or one.constant is not None:
            return None
        storage = one.untyped_storage()
        itself = next((n for n, tensor in enumerate(given) if tensor is one), None)
        where = itself if itself is not None else storages.index(storage._cdata) if storage._cdata in storages else None
        if where is None:
            alone = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
            if storage._cdata in own or one.storage_offset() or storage.nbytes() != alone.untyped_storage().nbytes():
                return None
            own.add(storage._cdata)
        elif type(given[where]) is not FakeTensor or (itself is None and not func.is_view and len(given) > 1):
            return None
        offset = int(one.storage_offset())
        found.append(_Form(where, itself is not None, one.dtype, tuple(one.shape), tuple(one.stride()), offset))
    return kind, tuple(found)
