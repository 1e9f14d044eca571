"""Attention among the sequences of one row, each by itself: no padding, and no mask over all of them.

transformers calls it where a model's attention is ``NAMES[…]`` (``use_varlen``), in place of SDPA. On CUDA it is
torch's own varlen flash kernel, elsewhere SDPA for one sequence after the other, which is what the kernel is tested
against. A pass of padded sequences, and whatever is not a step's pass, goes to SDPA as before. The same kernel runs
with and without a gradient, so that the two passes of a step agree to the bit while the adapter changes nothing.

A family may want the mask for more than its attention, or not hand on what attention is told. The proof at load sees
that; ``use_masks`` then has SDPA with a mask instead. An attention that is computed in plain torch ("eager", where
logits have a soft-cap or there are sinks) stays that, and only its mask is made from what the pass knows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.causal import Shape
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.packing import Packed, for_any_attention, for_varlen

varlen_attn: Callable[..., Tensor] | None
try:
    from torch.nn.attention import varlen as _torch_varlen

    varlen_attn = cast(Callable[..., Tensor], _torch_varlen.varlen_attn)
except ImportError:  # torch before 2.10
    varlen_attn = None

NAMES = {"sdpa": "repbend_varlen", "eager": "repbend_eager"}
"""What an attention of transformers is called where it knows the sequences of a row."""

MASKED = "repbend_sdpa"
"""SDPA whose mask tells the sequences of a row apart."""

WIDEST_HEAD = 256
UNEVEN_HEADS = range(193, 225)
"""Head sizes for which torch chooses another kernel with a gradient than without on cards in ``UNEVEN_CARDS``."""
UNEVEN_CARDS = ((8, 6), (8, 9), (12, 0), (12, 1))
WIDENED = 256
"""Keys up to which a CPU's kernel is faster in 32 bits than in 16, above all its backward (docs/log.md)."""
EAGER = "eager_attention_forward"
"""What transformers' files call a family's attention in plain torch."""
PLAIN = ("softcap", "s_aux", "position_bias")
"""What changes the logits of attention in a way that the kernel does not know."""


def use_varlen(body: nn.Module, device: torch.device, changes: Changes) -> None:
    """Let the decoder ``body`` compute its attention for sequences that share a row; families that do not ask
    transformers for their attention keep theirs.

    Raises:
        UserError: a head size for which this card's kernels differ with and without a gradient.
    """
    config = _config(body)
    name = NAMES.get(getattr(config, "_attn_implementation", None) or "")
    if config is None or name is None or not getattr(body, "_supports_attention_backend", False):
        return
    _refuse_uneven(body, config, device)
    if name == NAMES["eager"] and not hasattr(_source_of(body), EAGER):
        return
    _register()
    changes.attribute(config, "_attn_implementation", name)


def use_masks(body: nn.Module, changes: Changes) -> None:
    """Let the decoder's SDPA tell sequences of a row apart by a mask; another attention stays as it is."""
    config = _config(body)
    if config is not None and config._attn_implementation == NAMES["sdpa"]:
        changes.attribute(config, "_attn_implementation", MASKED)


def shares_beginnings(body: nn.Module, device: torch.device) -> bool:
    """Whether the decoder's attention takes sequences that go on from one beginning: on a CPU, sequence by sequence."""
    return device.type == "cpu" and getattr(_config(body), "_attn_implementation", None) == NAMES["sdpa"]


def knows_packing(body: nn.Module) -> bool:
    """Whether the decoder's masks follow what a pass says of its rows (``layers.packing.known_mask``)."""
    return getattr(_config(body), "_attn_implementation", None) in (*NAMES.values(), MASKED)


def attention_of(body: nn.Module, weight: Tensor, device: torch.device) -> str:
    """The name of the decoder's attention; one with "flash" in it where rows of several sequences have a kernel.

    Args:
        weight: of the dtype that the decoder computes in.
        device: where it does, or will: what a card of a plan can do is taken for granted.
    """
    config = _config(body)
    name = getattr(config, "_attn_implementation", None) or ""
    if config is None or name not in ("sdpa", NAMES["sdpa"]) or not getattr(body, "_supports_attention_backend", False):
        return name
    widths = _head_widths(body, config)
    there = device.type == "cuda" and (not torch.cuda.is_available() or _card_has_kernel(device))
    fits = weight.dtype in (torch.float16, torch.bfloat16) and all(map(_fits, widths))
    even = all(getattr(m, "v_head_dim", None) in (None, getattr(m, "qk_head_dim", None)) for m in body.modules())
    return "varlen flash" if there and fits and even and _torch_has_kernel() else name


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of query [B, H, T, E] to key and value [B, G, T, E], as transformers asks for it: [B, T, H, E].

    Raises:
        ValueError: sequences share the row, and attention has a part that cannot be computed for them.
    """
    if packed is None:
        return _plain(module, query, key, value, attention_mask, scaling, sliding_window, **others), None
    if unknown := [name for name in PLAIN if others.get(name) is not None]:
        raise ValueError(f"attention with {unknown[0]} has no path for sequences that share a row")
    window = None
    if attention_mask is not None:
        window = sliding_window or getattr(module, "sliding_window", None)
        if not isinstance(window, int):
            raise ValueError("attention has a mask of its own, which sequences that share a row do not know")
    if packed.shared:
        return _behind_shared(query, key, value, packed, scaling, window), None
    if takes_kernel(query, key, value):
        return _by_kernel(query, key, value, packed, scaling, window), None
    return _one_by_one(query, key, value, packed, scaling, window), None


def eager_attention(module: nn.Module, *tensors: Tensor, **others: object) -> tuple[Tensor, Tensor]:
    """The family's own attention in plain torch."""
    others.pop("packed", None)
    found: tuple[Tensor, Tensor] = getattr(_source_of(module), EAGER)(module, *tensors, **others)
    return found


def takes_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's varlen kernel computes this."""
    width = query.shape[-1]
    if not (query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _torch_has_kernel()):
        return False
    return width == key.shape[-1] == value.shape[-1] and _fits(width) and _card_has_kernel(query.device)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """One call for all sequences. A window of W positions is a position and the W − 1 before it."""
    assert varlen_attn is not None
    # An index would be a copy on the way back.
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    return varlen_attn(
        q,
        k,
        v,
        packed.bounds,
        packed.bounds,
        packed.longest,
        packed.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    ).unsqueeze(0)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """SDPA for each sequence."""
    found = []
    for start, stop in pairwise(accumulate(packed.lengths, initial=0)):
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        length = stop - start
        mask = None if window is None or window >= length else _causal_mask(length, window, query.device)
        found.append(_sdpa(q, k, v, mask, scaling).transpose(1, 2))
    return torch.cat(found, dim=1)


def _behind_shared(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """SDPA for the shared beginning, and for each sequence behind it."""
    shared, found = packed.shared, []
    ranges = [(0, shared), *pairwise(accumulate(packed.lengths, initial=shared))]
    for start, stop in ranges:
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        if start:
            k, v = (torch.cat((part[:, :, :shared], own), 2) for part, own in ((key, k), (value, v)))
        mask = _causal_mask(stop - start, window, query.device, k.shape[2] - q.shape[2])
        found.append(_sdpa(q, k, v, mask, scaling).transpose(1, 2))
    return torch.cat(found, dim=1)


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    **others: object,
) -> Tensor:
    """transformers' SDPA, in the precision that a sequence has where it shares a row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    dtype = _rounded_to(query, key)
    if dtype is None:
        return plain(module, query, key, value, mask, scaling=scaling, sliding_window=window, **others)[0]
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = query.float(), key.float(), value.float()
        out, _ = plain(module, q, k, v, mask, scaling=scaling, sliding_window=window, **others)
    return out.to(dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """SDPA under ``mask``, causal without one."""
    dtype = _rounded_to(query, key)
    with torch.autocast(query.device.type, enabled=False) if dtype else nullcontext():
        q, k, v = (part.float() if dtype else part for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.to(dtype) if dtype else out


def _rounded_to(query: Tensor, key: Tensor) -> torch.dtype | None:
    """What attention computed in 32 bits is rounded to; None where it is not: see ``WIDENED``.

    It does not ask for a gradient, since a reference pass has none; a token on its own, as in decoding, stays as it is.
    """
    kind = query.device.type
    if kind != "cpu" or not 1 < query.shape[2] <= key.shape[2] <= WIDENED:
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def _causal_mask(length: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """Which of ``before`` + ``length`` keys each of the last ``length`` positions sees, bool [length, keys]."""
    keys = torch.arange(before + length, device=device)
    behind = keys[before:, None] - keys[None, :]
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _refuse_uneven(body: nn.Module, config: Shape, device: torch.device) -> None:
    if config._attn_implementation != "sdpa" or device.type != "cuda" or not torch.cuda.is_available():
        return
    uneven = [width for width in _head_widths(body, config) if width in UNEVEN_HEADS]
    if uneven and torch.cuda.get_device_capability(device) in UNEVEN_CARDS:
        raise UserError(
            f"model type {config.model_type}: heads of {uneven[0]} values have another attention kernel with "
            "a gradient than without on this card, so that no distance would be 0 at the start; set "
            "model.attention=eager"
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, attention, mask in (
        (NAMES["sdpa"], varlen_attention, for_varlen(sdpa_mask)),
        (MASKED, sdpa_attention_forward, for_any_attention(sdpa_mask)),
        (NAMES["eager"], eager_attention, for_any_attention(eager_mask)),
    ):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)


def _config(body: nn.Module) -> Shape | None:
    config: Shape | None = getattr(body, "config", None)
    return config


def _head_widths(body: nn.Module, config: Shape) -> set[int]:
    """Of each layer's heads, as the layers say it: a configuration may have one for each kind of layer."""
    found = {width for module in body.modules() if isinstance(width := getattr(module, "head_dim", None), int)}
    return found or {config.hidden_size // config.num_attention_heads}


def _fits(width: int) -> bool:
    return width <= WIDEST_HEAD and width % 8 == 0


def _source_of(module: nn.Module) -> object:
    """The file that a module's class comes from."""
    return sys.modules[type(getattr(module, "block", module)).__module__]


def _card_has_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _torch_has_kernel() -> bool:
    return varlen_attn is not None and {"window_size", "enable_gqa", "scale"} <= set(
        inspect.signature(varlen_attn).parameters
    )
