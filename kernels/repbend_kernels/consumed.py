"""Which memory holds directions in place of references, so that nobody compares with them.

An op that overwrites references notes the place on their storage, with the storage's version: PyTorch counts every
write to a tensor and to its views and detached aliases. While the count stands, the memory still holds directions; any
later write counts as a refill. Nothing is read from the device. Unknown here: aliases with a count of their own
(``.data``, DLPack, NumPy), writes inside a compiled graph, and a refill of one part of a storage, which clears the
notes of its other parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_repbend_directions"


class _Note(NamedTuple):
    """Bytes of a storage that hold directions while its version is ``version``."""

    version: int
    spans: frozenset[tuple[int, int]]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last, of a tensor in its storage; an empty tensor has none."""
    if tensor.numel() == 0:
        return 0, 0
    last = int(sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _unwatched(tensor: Tensor) -> bool:
    """Compiled, captured and inference tensors have no count of writes to go by."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_references(name: str, reference: Tensor) -> None:
    """``reference`` does not hold the directions that an earlier call left there."""
    if _unwatched(reference):
        return
    note = getattr(reference.untyped_storage(), _ATTRIBUTE, None)
    if (
        note is not None
        and note.version == reference._version
        and any(_overlap(_span(reference), span) for span in note.spans)
    ):
        raise RuntimeError(
            f"{name}: this memory holds directions already, from an earlier call that overwrote its references; "
            "refill it, and keep taps outside checkpointed regions"
        )


def check_apart(name: str, tensors: Sequence[Tensor], others: Sequence[Tensor], other_name: str) -> None:
    """``tensors``, which will be overwritten, share no memory among themselves nor with ``others``."""
    if torch.compiler.is_compiling():
        return
    taken = [(other_name, other.untyped_storage()._cdata, _span(other)) for other in others]
    for tensor in tensors:
        storage, span = tensor.untyped_storage()._cdata, _span(tensor)
        for owner, its_storage, its_span in taken:
            if storage == its_storage and _overlap(span, its_span):
                raise RuntimeError(f"{name}: this call overwrites it, but it shares memory with {owner}; clone it")
        taken.append((f"other {name}", storage, span))


def note_directions(tensors: Sequence[Tensor]) -> None:
    """``tensors``, which have just been written, hold directions from now on."""
    for tensor in tensors:
        if torch.compiler.is_compiling() or tensor.is_inference():
            continue
        storage = tensor.untyped_storage()
        note = getattr(storage, _ATTRIBUTE, None)
        setattr(storage, _ATTRIBUTE, _Note(tensor._version, (note.spans if note else frozenset()) | {_span(tensor)}))


def drop_stale_notes(tensors: Sequence[Tensor]) -> None:
    """Forget notes that a write of somebody else has outdated. Call it before writing to ``tensors``."""
    for tensor in tensors:
        if torch.compiler.is_compiling() or tensor.is_inference():
            continue
        storage = tensor.untyped_storage()
        note = getattr(storage, _ATTRIBUTE, None)
        if note is not None and note.version != tensor._version:
            delattr(storage, _ATTRIBUTE)
