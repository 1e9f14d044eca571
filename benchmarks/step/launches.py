"""Counts what a step asks of a GPU: kernel launches, and the bytes that they read and write, by part and kind of work.

Counted by dispatch: an operation of torch is one launch, views and allocations none, operations that are several
kernels by the table below. The project's own ops are looked into; a Triton kernel is one launch. Bytes are those of all
tensors that a launch is given or makes, each once if read and once if written: hits of a cache are not known, so they
are an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step.pointers import access_of
from benchmarks.step.pretended_cuda import PROJECT, on_the_cpu
from repbend_fast import ranges

# Kernels of operations that are not one: flash attention's backward (row sums, the gradients, the query's to 16 bits).
KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "aten::_scaled_dot_product_flash_attention_backward": 3,
    "aten::_flash_attention_backward": 3,
    "torch_attn::_varlen_attn_backward": 3,
}
# Of a product with an NF4 weight, beside the product: two-level scales dequantised, their offset added, the weight.
DEQUANTISING = 3
# Without a kernel, though they are no views.
NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
        "_reshape_alias", "lift_fresh", "is_same_size", "resize_", "set_", "sym_size", "is_pinned",
    )
)  # fmt: skip
# What they write they do not read.
WRITE_ONLY = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_", "uniform_", "normal_"))
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
KINDS = (
    ("LoRA", ("low_rank", "lora")),
    ("head", ("linear_kl_div", "linear_log_prob")),
    ("distances", ("bend_tap", "window_distance", "pairwise_cosine", "tap_rows", "triplet", "row_distance")),
    ("dropout", ("keyed_dropout",)),
    ("dequantisation", ("dequantize",)),
    ("attention", ("attention", "_varlen_attn")),
)
PARTS = {
    ranges.REFERENCE: "reference",
    ranges.SUMS: "sums",
    ranges.ADAPTED: "adapted",
    ranges.BACKWARD: "backward",
}


@dataclass
class Count:
    """Launches, the bytes that they read and write, and the operations of matrix products among them."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, launches: int, size: int, flops: int = 0) -> None:
        """One more operation."""
        self.launches += launches
        self.bytes += size
        self.flops += flops


class LaunchCounter(TorchDispatchMode):
    """Context manager. Counts what runs inside, under ``pretended_cuda`` on fake tensors.

    Attributes:
        found: by part of the step and kind of work.
        names: launches by operation or kernel, to see where they come from.
        calls: calls of the project's own ops, by part; LoRA's kernels count where no op surrounds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Count] = {}
        self.names: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()
        self._within: list[str] = []
        self._ranges: list[str] = []

    def launched(self, kernel: Callable[..., object], tensors: dict[str, Tensor]) -> None:
        """A Triton kernel. A tensor that it reads more than once is counted once."""
        access = access_of(kernel)
        size = sum(_size(t) * max(1, (n in access.read) + (n in access.written)) for n, t in tensors.items())
        name, module = kernel.__name__, kernel.__module__
        self._add(name, module, 1, size)
        if not self._within and self._kind(name, module) == "LoRA":
            # Sums of parts come behind the kernel that left them, in the same call.
            self.calls[self._part()] += name != "sum_parts_kernel"

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        name, kwargs = func._schema.name, on_the_cpu(kwargs or {})
        if name.startswith("profiler::"):
            self._mark(name, args)
            return func(*args, **kwargs)
        if func.namespace in PROJECT:
            return self._inside(name, args, kwargs)
        made = func(*args, **kwargs)
        if name == "bitsandbytes::gemm_4bit":
            self._four_bits(args, cast(Tensor, made))
        elif not (func.is_view or name in NOTHING or name.startswith("prim::")):
            size = _moved(func, name, args, kwargs, made)
            self._add(name, "", KERNELS.get(name, 1), size, _flops(name, args, made))
        return made

    def _four_bits(self, args: tuple[object, ...], made: Tensor) -> None:
        """The weight in 16 bits, written and read by a plain product: so bitsandbytes does it for more than few
        rows.
        """
        inputs, packed = cast(Tensor, args[0]), cast(Tensor, args[1])
        weight = 2 * packed.numel() * inputs.element_size()
        self._add("bitsandbytes::dequantize_4bit", "", DEQUANTISING, _size(packed) + weight)
        flops = 2 * inputs.numel() * made.shape[-1]
        self._add("aten::mm", "", 1, _size(inputs) + weight + _size(made), flops)

    def _inside(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        self.calls[self._part()] += not self._within
        self._within.append(name)
        try:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        finally:
            self._within.pop()

    def _mark(self, name: str, args: tuple[object, ...]) -> None:
        if "enter" in name:
            self._ranges.append(str(args[0]))
        elif self._ranges:
            self._ranges.pop()

    def _add(self, name: str, module: str, launches: int, size: int, flops: int = 0) -> None:
        part, kind = self._part(), self._kind(name, module)
        self.found.setdefault((part, kind), Count()).add(launches, size, flops)
        self.names[part, "/".join([*self._within, name])] += launches

    def _part(self) -> str:
        part = next((PARTS[r] for r in self._ranges if r in PARTS), "outside")
        return "recompute" if part == "backward" and ranges.CHECKPOINTED in self._ranges else part

    def _kind(self, name: str, module: str) -> str:
        for kind, marks in KINDS:
            if any(mark in text for mark in marks for text in (*self._within, name, module)):
                return kind
        if name.startswith(PRODUCTS):
            return "products"
        return "Liger" if module.startswith("liger_kernel") else "elementwise"


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved(func: OpOverload, name: str, args: tuple[object, ...], kwargs: dict[str, object], made: object) -> int:
    """Bytes that an operation reads and writes."""
    read = [value for key, value in kwargs.items() if key != "out"]
    read += args[1:] if name in WRITE_ONLY else args
    return sum(map(_size, _tensors(read))) + sum(map(_size, _tensors(made)))


def _flops(name: str, args: tuple[object, ...], made: object) -> int:
    """Of a matrix product; 0 for anything else."""
    if not name.startswith(PRODUCTS) or not isinstance(made, Tensor):
        return 0
    left = cast(Tensor, args[1 if "add" in name else 0])
    return 2 * left.numel() * made.shape[-1]
