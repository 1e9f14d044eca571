"""LoRA's forward and backward with the least memory, and dropout whose masks follow keys of the rows.

PEFT's layers keep their weights, names, saving, merging and switching off; only what ``forward`` does with the low-rank part is
replaced, by two autograd functions around the base layer, whatever that is. With m = keep · x (the keyed mask, without its factor)
and f = s/(1 − p):

    forward    P = m Aᵀ  [N, r]          y = W x          y += f · P Bᵀ                 in place: the base layer's output is fresh
    backward   Q = f · G B  [N, r]       dB = f · Gᵀ P    dx = G W    dx += keep · (Q A)    dA = Qᵀ m
                                                                 in place: the base layer's gradient is fresh

Kept for backward: x by reference (q, k and v share one) or, where ``layers.recompute`` knows how it was made, what it was made of;
P; and the rows' hashed keys, which all layers share. PEFT keeps x, the
mask, the dropped x (in A's dtype, so in 32 bits for a 16-bit model), P, and makes up to four tensors of the output's size on the way.

Products of bf16 activations lose nothing of 32-bit adapter weights: on CUDA the weight enters the matrix product as the sum of two
16-bit parts (in float16 only what its range holds: parts below 6e-8 are lost), elsewhere the rows are widened chunk by chunk
(``PRODUCTS``). Rows are walked in chunks, so that what is masked never has x's size.

The training step gives the rows' keys (:func:`lora_dropout`). Without them a layer does what PEFT's does: in training mode each call
draws masks from torch's generator, in evaluation mode there is no dropout.

Legend: N rows (tokens), D inputs, O outputs, r rank, G gradient of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast

import torch
from repbend_kernels.checks import accumulate_dtype, in_own_dtypes
from repbend_kernels.keyed_dropout import KeyedMask, row_hashes
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.recompute import Origin, origin_of

# Elements of a chunk of rows. On a CPU smaller ones, which stay in a core's cache, are no faster (docs/log.md); on a GPU it
# fills the device and is small beside a model. A matrix product of fewer rows than the least would read the adapter's weights too often.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}
LEAST_ROWS = 64

# How 16-bit rows meet 32-bit adapter weights: "parts" = the weights in 16-bit parts, as a GPU's matrix units take them, "wide" = the
# rows in 32 bits, None = parts on CUDA and wide elsewhere. Both run everywhere.
PRODUCTS: Literal["parts", "wide"] | None = None


class DropoutKeys:
    """What all adapted layers of a model share.

    ``rows`` are the hashed keys (int32 [N]) of the rows that the pass in progress runs, None for no dropout. ``given`` says whether
    :func:`lora_dropout` decides; where it does not, dropout follows the layers' training mode.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.given = False


def _in_parts(rows: Tensor) -> bool:
    return rows.is_cuda if PRODUCTS is None else PRODUCTS == "parts"


def _mm(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left · right of 16-bit operands in ``acc``, which torch's product for the CPU does not offer."""
    return torch.mm(left, right, out_dtype=acc) if left.is_cuda else left.to(acc) @ right.to(acc)


def _parts(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a 16-bit ``dtype`` whose sum is ``wide`` to about 16 bits."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def _product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left [n, k] · right [k, m] → [n, m] in ``acc``. ``left`` may have 16 bits: it is not rounded, nor is ``right``."""
    if left.dtype == acc or left.dtype == right.dtype == acc:
        return left @ right.to(acc)
    if not _in_parts(left):
        return left.to(acc) @ right.to(acc)
    if right.dtype == left.dtype:
        return _mm(left, right, acc)
    both = _mm(left, torch.cat(_parts(right, left.dtype), dim=1), acc)
    return both[:, : right.shape[1]] + both[:, right.shape[1] :]


def _low_rank_operands(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """16-bit operands of one product that stands for left [n, r] · right [r, m] of wider ones: the three larger products of parts."""
    left_high, left_low = _parts(left, dtype)
    right_high, right_low = _parts(right.to(left.dtype), dtype)
    return torch.cat((left_high, left_high, left_low), dim=1), torch.cat((right_high, right_low, right_high), dim=0)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """out [n, m] += factor · left [n, r] · right [r, m], rounded once to ``out``'s dtype; ``left`` has the accumulating dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right.to(left.dtype), alpha=factor)
    elif _in_parts(out):
        out.addmm_(*_low_rank_operands(left, right, out.dtype), alpha=factor)
    else:
        out.copy_(torch.addmm(out.to(left.dtype), left, right.to(left.dtype), alpha=factor))


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    count, width = rows.shape
    step = max(LEAST_ROWS, CHUNK_ELEMENTS["cpu" if rows.device.type == "cpu" else "other"] // width)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _chunks_of_narrow(rows: Tensor, acc: torch.dtype) -> Iterator[tuple[int, int]]:
    """Chunks of 16-bit ``rows`` [N, width], whose products need operands of their own; others all at once."""
    return iter([(0, rows.shape[0])]) if rows.dtype == acc else _chunks(rows)


class _MaskedRows:
    """What dropout leaves of chunks of rows of x, and the same mask on what goes back to them; a buffer serves every chunk."""

    def __init__(self, x: Tensor, hashes: Tensor | None, place: int, p: float) -> None:
        self.mask = None if hashes is None else KeyedMask(hashes, place, p, x.shape[1], x.dtype, hashed=True)
        self.x, self.buffer = x, x.new_empty((0, x.shape[1]))

    def read(self, start: int, stop: int, inner: Tensor | None = None) -> Tensor:
        """Rows of x, masked; the next call overwrites them. ``inner``, of the same rows, is masked in place."""
        rows = self.x[start:stop]
        if self.mask is None:
            return rows
        if self.buffer.shape[0] < stop - start:
            self.buffer = self.x.new_empty((stop - start, self.x.shape[1]))
        kept = self.buffer[: stop - start]
        self.mask.apply([rows] if inner is None else [rows, inner], [kept] if inner is None else [kept, inner], start, stop)
        return kept

    def add_gradient_(self, grad_rows: Tensor, start: int, stop: int, up: Tensor, a: Tensor, *, read: bool) -> Tensor | None:
        """``grad_rows`` += keep · (Q A), Q being ``up``, rounded once where the device allows it; with ``read`` the rows of x, masked."""
        if self.mask is None:
            _add_product_(grad_rows, up, a, 1.0)
            return self.read(start, stop) if read else None
        if _in_parts(up) and grad_rows.dtype != up.dtype:
            inner = torch.mm(*_low_rank_operands(up, a, grad_rows.dtype))
        else:
            inner = up @ a.to(up.dtype)
        kept = None
        if read:
            kept = self.read(start, stop, inner)
        else:
            self.mask.apply([inner], [inner], start, stop)
        grad_rows.add_(inner)
        return kept


def _down(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    acc = accumulate_dtype(x.dtype)
    down = x.new_empty((x.shape[0], a.shape[0]), dtype=acc)
    rows = _MaskedRows(x, hashes, place, p)
    with in_own_dtypes(x.device):
        for start, stop in _chunks(x):
            down[start:stop] = _product(rows.read(start, stop), a.T, acc)
    return down


def _add_up_(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    with in_own_dtypes(result.device):
        for start, stop in _chunks_of_narrow(result, down.dtype):
            _add_product_(result[start:stop], down[start:stop], b.T, factor)


@torch.library.custom_op("repbend_fast::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    """P = (keep · x) Aᵀ, [N, r] in float32 (float64 for float64), of ``x`` [N, D]; ``hashes`` are the rows' hashed keys, int32 [N]."""
    return _down(x, a, hashes, place, p)


@low_rank_down.register_fake
def _(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[0]), dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("repbend_fast::add_low_rank_gradient_", mutates_args={"grad_x"})
def add_low_rank_gradient_(
    grad_x: Tensor, x: Tensor, a: Tensor, up: Tensor, hashes: Tensor | None, place: int, p: float, needs: list[bool]
) -> Tensor:
    """``grad_x`` [N, D] += keep · (Q A) in place and dA = Qᵀ (keep · x) in A's dtype, of them what ``needs`` asks for (dA else [0, D]).

    ``up`` is Q [N, r] in float32 (float64 for float64), in which the sum over rows runs.
    """
    grad_a = torch.zeros((a.shape[0] if needs[1] else 0, a.shape[1]), dtype=up.dtype, device=x.device)
    rows = _MaskedRows(x, hashes, place, p)
    with in_own_dtypes(x.device):
        for start, stop in _chunks(x):
            part = up[start:stop]
            if needs[0]:
                kept = rows.add_gradient_(grad_x[start:stop], start, stop, part, a, read=needs[1])
            else:
                kept = rows.read(start, stop)
            if kept is not None:
                grad_a += _product(kept.T, part, up.dtype).T
    return grad_a.to(a.dtype)


@add_low_rank_gradient_.register_fake
def _(grad_x: Tensor, x: Tensor, a: Tensor, up: Tensor, hashes: Tensor | None, place: int, p: float, needs: list[bool]) -> Tensor:
    return a.new_empty((a.shape[0] if needs[1] else 0, a.shape[1]))


@torch.library.custom_op("repbend_fast::add_low_rank_up_", mutates_args={"result"})
def add_low_rank_up_(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    """``result`` [N, O] += f · P Bᵀ in place, P being ``down`` [N, r]."""
    _add_up_(result, down, b, factor)


@torch.library.custom_op("repbend_fast::low_rank_up_gradients", mutates_args=())
def low_rank_up_gradients(grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]) -> list[Tensor]:
    """Those of Q = f · G B [N, r] in P's dtype and dB = f · Gᵀ P in B's that ``needs`` asks for; the sum over rows runs in P's dtype."""
    up = torch.empty_like(down)
    grad_b = torch.zeros(b.shape, dtype=down.dtype, device=b.device)
    with in_own_dtypes(grad.device):
        for start, stop in _chunks_of_narrow(grad, down.dtype):
            rows = grad[start:stop]
            if needs[0]:
                torch.mul(_product(rows, b, down.dtype), factor, out=up[start:stop])
            if needs[1]:
                grad_b += _product(rows.T, down[start:stop], down.dtype)
    results = (up, grad_b.mul_(factor).to(b.dtype))
    return [result for result, needed in zip(results, needs) if needed]


@low_rank_up_gradients.register_fake
def _(grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]) -> list[Tensor]:
    return [like.new_empty(like.shape) for like, needed in zip((down, b), needs) if needed]


class _Down(torch.autograd.Function):
    """``(x, P)``. The base layer reads the x that comes out, so that its gradient of x passes through here and takes the low-rank
    part in, without a tensor and a sum of its own."""

    @staticmethod
    def forward(ctx, x, a, hashes, place, p, origin=None):
        ctx.recomputation = None
        if origin is not None and any(ctx.needs_input_grad):
            ctx.recomputation = origin.recomputation
            ctx.recomputation.readers += 1
        ctx.save_for_backward(a, hashes, *((x,) if ctx.recomputation is None else origin.inputs))
        ctx.settings = place, p
        ctx.set_materialize_grads(False)
        return x, low_rank_down(x, a, hashes, place, p)

    @staticmethod
    def backward(ctx, grad_x, up):
        needs = list(ctx.needs_input_grad[:2])
        if up is None:
            return grad_x, None, None, None, None, None
        a, hashes, *kept = ctx.saved_tensors
        x = kept[0] if ctx.recomputation is None else ctx.recomputation.read(kept)
        x = x.reshape(-1, x.shape[-1])
        if grad_x is None:
            grad_x = torch.zeros_like(x) if needs[0] else x.new_empty((0, x.shape[1]))
        grad_a = add_low_rank_gradient_(grad_x, x, a, up, hashes, *ctx.settings, needs)
        return grad_x if needs[0] else None, grad_a if needs[1] else None, None, None, None, None


class _Up(torch.autograd.Function):
    """``result`` [N, O] with f · P Bᵀ added in place."""

    @staticmethod
    def forward(ctx, result, down, b, factor):
        add_low_rank_up_(result, down, b, factor)
        ctx.mark_dirty(result)
        ctx.save_for_backward(down, b)
        ctx.factor = factor
        return result

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[1:3])
        found = iter(low_rank_up_gradients(grad, *ctx.saved_tensors, ctx.factor, needs))
        return grad, *(next(found) if needed else None for needed in needs), None


class LowRankForward(nn.Module):
    """What an adapted layer of PEFT gets in front of its own class: the same layer, with this module's forward."""

    dropout_keys: DropoutKeys
    place: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' parts, [..., O] in the base layer's dtype."""
        layer: Any = self
        if layer.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        # Two dimensions: with three, a bias makes the output a view, and adding to it in place would copy its gradient.
        flat, origin = x.reshape(-1, x.shape[-1]), origin_of(x)
        names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        downs = []
        for name in names:
            dropout = self._dropout(name, flat)
            source, down = self._down(flat, name, origin, *dropout)
            downs.append((name, down, *dropout))
            # Where x needs no gradient the base layer has none to make.
            flat = source if x.requires_grad else flat
        result = layer.base_layer(flat)
        for name, down, hashes, p in downs:
            result = self._add_up(result, down, name, hashes, p)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _dropout(self, name: str, x: Tensor) -> tuple[Tensor | None, float]:
        """The hashed keys of x's rows, and p; None = no dropout."""
        module, keys = cast(Any, self).lora_dropout[name], self.dropout_keys
        p = getattr(module, "p", 0.0)
        if p == 0:
            return None, p
        if not keys.given:
            if not (self.training and module.training):
                return None, p
            # At every call anew, from the generator that checkpointing sets back: a recomputed block draws the same masks.
            return torch.randint(-(2**31), 2**31, x.shape[:1], dtype=torch.int32, device=x.device), p
        if keys.rows is not None and keys.rows.numel() != x.shape[0]:
            raise ValueError(f"lora_dropout: keys for {keys.rows.numel()} rows, but the pass has {x.shape[0]}")
        return keys.rows, p

    def _down(self, x: Tensor, name: str, origin: Origin | None, hashes: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
        a = cast(Any, self).lora_A[name].weight
        if hashes is None and not torch.is_grad_enabled():
            # Generating comes here for each token, where an op and an autograd function cost more than their work.
            return x, _down(x, a, None, self.place, p)
        return _Down.apply(x, a, hashes, self.place, p, origin)

    def _add_up(self, result: Tensor, down: Tensor, name: str, hashes: Tensor | None, p: float) -> Tensor:
        layer: Any = self
        factor = float(layer.scaling[name] / (1 - p) if hashes is not None else layer.scaling[name])
        b = layer.lora_B[name].weight
        if hashes is None and not torch.is_grad_enabled():
            _add_up_(result, down, b, factor)
            return result
        return _Up.apply(result, down, b, factor)


@cache
def _with_low_rank_forward(base: type) -> type:
    return type(f"LowRank{base.__name__}", (LowRankForward, base), {})


def use_low_rank_forward(model: nn.Module, changes: Changes | None = None) -> None:
    """Give every LoRA layer of a PEFT model this module's forward, in place; a second call changes nothing.

    Raises:
        UserError: a kind of adapter whose forward is not plain LoRA (DoRA, a LoRA bias, an adapted embedding or 8-bit layer).
    """
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    changes, keys = changes or Changes(), DropoutKeys()
    for place, (name, layer) in enumerate(layers):
        if isinstance(layer, LowRankForward):
            return
        if type(layer).__name__ not in ("Linear", "Linear4bit"):
            raise UserError(f"the adapter on {name} is of kind {type(layer).__name__}; only LoRA on linear and 4-bit layers can be trained")
        if layer.lora_variant or any(linear.bias is not None for linear in layer.lora_B.values()):
            raise UserError(f"the adapter on {name} is not plain LoRA (use_dora, lora_bias or another variant); train one without it")
        own: type = type(layer)
        changes.kind(layer, _with_low_rank_forward(own))
        changes.entry(vars(layer), "dropout_keys", keys)
        changes.entry(vars(layer), "place", place)


def set_dropout_rate(model: nn.Module, p: float, changes: Changes | None = None) -> None:
    """Let LoRA's dropout drop the share ``p``, in place; no other dropout of the model."""
    changes = changes or Changes()
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            if getattr(dropout, "p", p) != p:
                changes.attribute(dropout, "p", p)


@contextmanager
def lora_dropout(model: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """LoRA's dropout, and only LoRA's, for the passes inside, their backward included (recomputed blocks read the keys again).

    The keys decide, whatever the mode. A model's own dropout stays off: it would make the adapted pass differ from the reference at B = 0.

    Args:
        keys: int64 [N] or [B, T], one for each row of the pass: rows of equal keys get equal masks, in each layer another.
            None switches dropout off.

    Raises:
        UserError: keys for a model whose layers :func:`use_low_rank_forward` has not prepared.
        ValueError: from a pass whose number of rows is not that of the keys.
    """
    shared = next((module.dropout_keys for module in model.modules() if isinstance(module, LowRankForward)), None)
    if shared is None:
        if keys is not None:
            raise UserError("this model has no LoRA adapter that is prepared for training; attach one, then use_low_rank_forward")
        yield
        return
    previous = shared.rows, shared.given
    shared.rows, shared.given = None if keys is None else row_hashes(keys.reshape(-1)), True
    try:
        yield
    finally:
        shared.rows, shared.given = previous
