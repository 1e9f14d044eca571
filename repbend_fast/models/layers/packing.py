"""Several sequences in one row: what a pass says of them, and the mask that transformers makes of it.

transformers reads off the position ids whether a row holds several sequences, which makes the host wait for the device
at the start of every pass, with nothing left for the device to do meanwhile. The passes of a step know it beforehand.
They say it in the attention mask: a mask of ones that carries what is known, which the mask functions here understand
(``layers.varlen`` registers them). A mask without it, as in generation, is treated as transformers treats it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import masking_utils

_ATTRIBUTE = "_repbend_packed"
_HOST = "_repbend_host_ids"


@dataclass(frozen=True)
class Packed:
    """Sequences that share the one row of a pass, one behind the other.

    Attributes:
        lengths: of each, without what they share.
        position_ids: int64 [1, T], from 0 in each, or from ``shared``.
        bounds: where each begins, and the end of the last, int32 [S + 1].
        shared: positions at the row's beginning that are the beginning of every sequence; they stand there once.
    """

    lengths: tuple[int, ...]
    position_ids: Tensor
    bounds: Tensor
    shared: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def numbers(self) -> Tensor:
        """Which sequence each position belongs to, int64 [1, T]."""
        return (self.position_ids == 0).cumsum(-1) - 1

    def on(self, device: torch.device) -> Packed:
        """The same on a device, without waiting for it."""
        return replace(self, position_ids=to_device(self.position_ids, device), bounds=to_device(self.bounds, device))


def pack(lengths: Sequence[int], device: torch.device, shared: int = 0) -> Packed:
    """Sequences of these lengths in one row, behind the ``shared`` positions that each of them goes on from."""
    own = [position for length in lengths for position in range(shared, shared + length)]
    positions = torch.tensor([[*range(shared), *own]], dtype=torch.int64)
    bounds = torch.tensor([*accumulate(lengths, initial=shared)], dtype=torch.int32)
    return Packed(tuple(lengths), positions, bounds, shared).on(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, without waiting for the device: from pageable memory CUDA waits until its queue is
    empty.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def known_on_host(ids: Tensor, device: torch.device) -> Tensor:
    """Host ids on ``device``, which :func:`host_copy` finds again without asking the device."""
    sent = to_device(ids, device)
    if sent is not ids:
        setattr(sent, _HOST, ids)
    return sent


def host_copy(ids: Tensor) -> Tensor:
    """The ids in host memory. Those that nobody has kept there come from the device, which waits for its queued
    work.
    """
    kept: Tensor | None = getattr(ids, _HOST, None)
    return ids.to("cpu") if kept is None else kept


def known_mask(input_ids: Tensor, packed: Packed | None, device: torch.device) -> Tensor:
    """The attention mask of a pass that needs none, bool [B, T]: it says which sequences share the row, or that none
    do.
    """
    mask = torch.ones(input_ids.shape, dtype=torch.bool, device=device)
    setattr(mask, _ATTRIBUTE, (packed,))
    return mask


Mask = Callable[..., Tensor | None]


def for_varlen(make: Mask) -> Mask:
    """A mask function for an attention that keeps the sequences of a row apart by itself.

    For them it gives None where each position sees all before it, and the pass's own mask, bool [B, 1, 1, T], which
    stands for no pattern, where it sees less. Else it gives what ``make`` does.
    """

    def mask(
        *,
        mask_function: object = masking_utils.causal_mask_function,
        attention_mask: Tensor | None = None,
        **shape: object,
    ) -> Tensor | None:
        known: tuple[Packed | None] | None = getattr(attention_mask, _ATTRIBUTE, None)
        if known is None:
            return make(mask_function=mask_function, attention_mask=attention_mask, **shape)
        if known[0] is None:
            return make(mask_function=mask_function, attention_mask=None, **shape)
        if attention_mask is None or mask_function is masking_utils.causal_mask_function:
            return None
        return attention_mask[:, None, None, :]

    return mask


def for_any_attention(make: Mask) -> Mask:
    """A mask function for an attention that follows its mask alone: ``make``'s mask, and between sequences nothing."""

    def mask(
        *,
        mask_function: Callable[..., object] = masking_utils.causal_mask_function,
        attention_mask: Tensor | None = None,
        **shape: object,
    ) -> Tensor | None:
        known: tuple[Packed | None] | None = getattr(attention_mask, _ATTRIBUTE, None)
        if known is None:
            return make(mask_function=mask_function, attention_mask=attention_mask, **shape)
        if known[0] is None:
            return make(mask_function=mask_function, attention_mask=None, **shape)
        apart = masking_utils.packed_sequence_mask_function(known[0].numbers())
        shape["allow_is_causal_skip"] = False
        return make(mask_function=masking_utils.and_masks(mask_function, apart), attention_mask=None, **shape)

    return mask
