"""LoRA's forward and backward with the least memory, and dropout whose masks follow keys of the rows.

PEFT's layers keep their weights, names, saving, merging and switching off; only what ``forward`` does with the low-rank part is
replaced. With m = keep · x (the keyed mask, without its factor) and f = s/(1 − p):

    forward    P = m Aᵀ              [N, r], kept        result += f · P Bᵀ        in place: the base layer's output is fresh
    backward   Q = f · G B           [N, r]              dB = f · Gᵀ P      dA = Qᵀ m      dx = keep · (Q A)

Kept for backward: x by reference (q, k and v share one) and P. PEFT keeps x, the mask, the dropped x (in A's dtype, so in 32 bits for
a 16-bit model), P, and makes up to four tensors of the output's size on the way.

Products of 16-bit activations lose nothing of 32-bit adapter weights: on CUDA the weight enters the matrix product as the sum of two
16-bit parts, elsewhere the rows are widened chunk by chunk. Rows are walked in chunks, so that what is masked never has x's size.

Legend: N rows (tokens), D inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from repbend_kernels.keyed_dropout import KeyedMask
from torch import Tensor, nn

from repbend_fast.errors import UserError

# Elements of a chunk of rows. On a CPU smaller ones, which stay in a core's cache, are no faster (docs/log.md); on a GPU it
# fills the device and is small beside a model. A matrix product of fewer rows than the least would read the adapter's weights too often.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}
LEAST_ROWS = 64


class DropoutKeys:
    """What all adapted layers of a model share: the keys of the rows that the pass in progress runs, or None."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parts(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a 16-bit ``dtype`` whose sum is ``wide`` to about 16 bits."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def _product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left [n, k] · right [k, m] → [n, m] in ``acc``. ``left`` may have 16 bits: it is not rounded, nor is ``right``."""
    if left.dtype == acc or left.dtype == right.dtype == acc:
        return left @ right.to(acc)
    if not left.is_cuda:
        return left.to(acc) @ right.to(acc)
    if right.dtype == left.dtype:
        return torch.mm(left, right, out_dtype=acc)
    both = torch.mm(left, torch.cat(_parts(right, left.dtype), dim=1), out_dtype=acc)
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
    elif out.is_cuda:
        out.addmm_(*_low_rank_operands(left, right, out.dtype), alpha=factor)
    else:
        out.copy_(torch.addmm(out.to(left.dtype), left, right.to(left.dtype), alpha=factor))


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out [n, m] = left [n, r] · right [r, m], rounded once to ``out``'s dtype; ``left`` has the accumulating dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right.to(left.dtype), out=out)
    elif left.is_cuda:
        torch.mm(*_low_rank_operands(left, right, out.dtype), out=out)
    else:
        out.copy_(left @ right.to(left.dtype))


def _chunks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    step = max(LEAST_ROWS, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class _Masks:
    """What dropout leaves of blocks of rows of x, and of their gradient: one mask for both, and a buffer that serves every block."""

    def __init__(self, x: Tensor, keys: Tensor | None, place: int, p: float) -> None:
        self.mask = None if keys is None else KeyedMask(keys, place, p, x.shape[1], x.dtype)
        self.x, self.buffer = x, x.new_empty((0, x.shape[1]))

    def rows(self, start: int, stop: int, inner: Tensor | None = None) -> Tensor:
        """Rows of x, masked; the next call overwrites them. ``inner``, of the same rows, is masked in place."""
        rows = self.x[start:stop]
        if self.mask is None:
            return rows
        if self.buffer.shape[0] < stop - start:
            self.buffer = self.x.new_empty((stop - start, self.x.shape[1]))
        kept = self.buffer[: stop - start]
        self.mask.apply([rows] if inner is None else [rows, inner], [kept] if inner is None else [kept, inner], start, stop)
        return kept

    def gradient(self, start: int, stop: int, inner: Tensor) -> None:
        """``inner`` alone, in place."""
        if self.mask is not None:
            self.mask.apply([inner], [inner], start, stop)


def _add_rows_(result: Tensor, x: Tensor, a: Tensor, b: Tensor, keys: Tensor | None, factor: float, place: int, p: float) -> Tensor:
    acc, flat = _accumulate_dtype(result.dtype), x.reshape(-1, x.shape[-1])
    down = torch.empty((flat.shape[0], a.shape[0]), dtype=acc, device=x.device)
    masks = _Masks(flat, keys, place, p)
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _chunks(flat.shape[0], max(flat.shape[1], result.shape[1]), x.device):
            down[start:stop] = _product(masks.rows(start, stop).to(result.dtype), a.T, acc)
            _add_product_(result[start:stop], down[start:stop], b.T, factor)
    return down


@torch.library.custom_op("repbend_fast::add_low_rank_", mutates_args={"result"})
def add_low_rank_(result: Tensor, x: Tensor, a: Tensor, b: Tensor, keys: Tensor | None, factor: float, place: int, p: float) -> Tensor:
    """``result`` [N, O] += f · P Bᵀ, in place; returns P [N, r] in float32 (float64 for float64). ``x`` is [..., D], ``keys`` [N]."""
    return _add_rows_(result, x, a, b, keys, factor, place, p)


@add_low_rank_.register_fake
def _(result: Tensor, x: Tensor, a: Tensor, b: Tensor, keys: Tensor | None, factor: float, place: int, p: float) -> Tensor:
    return result.new_empty((result.shape[0], a.shape[0]), dtype=_accumulate_dtype(result.dtype))


@torch.library.custom_op("repbend_fast::low_rank_gradients", mutates_args=())
def low_rank_gradients(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    down: Tensor,
    keys: Tensor | None,
    factor: float,
    place: int,
    p: float,
    needs: list[bool],
) -> list[Tensor]:
    """Those gradients of x, A and B that ``needs`` asks for, in their dtypes; sums over rows run in ``down``'s dtype."""
    acc, flat = down.dtype, x.reshape(-1, x.shape[-1])
    grad_x = torch.empty(x.shape if needs[0] else (0, x.shape[-1]), dtype=x.dtype, device=x.device)
    grad_a = torch.zeros((flat.shape[1], a.shape[0]), dtype=acc, device=x.device)
    grad_b = torch.zeros(b.shape, dtype=acc, device=x.device)
    grad_rows, masks = grad_x.view(-1, x.shape[-1]), _Masks(flat, keys, place, p)
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _chunks(flat.shape[0], max(flat.shape[1], grad.shape[1]), x.device):
            rows = grad[start:stop]
            if needs[2]:
                grad_b += _product(rows.T, down[start:stop], acc)
            if not (needs[0] or needs[1]):
                continue
            up = _product(rows, b, acc).mul_(factor)
            inner = grad_rows[start:stop] if needs[0] else None
            if inner is not None:
                _product_into(inner, up, a)
            if needs[1]:
                grad_a += _product(masks.rows(start, stop, inner).to(grad.dtype).T, up, acc)
            elif inner is not None:
                masks.gradient(start, stop, inner)
    results = (grad_x, grad_a.T.to(a.dtype), grad_b.mul_(factor).to(b.dtype))
    return [result for result, needed in zip(results, needs) if needed]


@low_rank_gradients.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    down: Tensor,
    keys: Tensor | None,
    factor: float,
    place: int,
    p: float,
    needs: list[bool],
) -> list[Tensor]:
    return [like.new_empty(like.shape) for like, needed in zip((x, a, b), needs) if needed]


class _LowRank(torch.autograd.Function):
    """``result`` [N, O] with f · (keep · x) Aᵀ Bᵀ added in place."""

    @staticmethod
    def forward(ctx, result, x, a, b, keys, factor, place, p):
        down = add_low_rank_(result, x, a, b, keys, factor, place, p)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, a, b, down, keys)
        ctx.settings = factor, place, p
        return result

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[1:4])
        found = iter(low_rank_gradients(grad, *ctx.saved_tensors, *ctx.settings, needs))
        return grad, *(next(found) if needed else None for needed in needs), None, None, None, None


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
        result = layer.base_layer(x.reshape(-1, x.shape[-1]))
        if not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    result = self._add(result, x, name)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _add(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        layer: Any = self
        keys, p = self.dropout_keys.rows, getattr(layer.lora_dropout[name], "p", 0.0)
        if p == 0:
            keys = None
        if keys is not None and keys.numel() != result.shape[0]:
            raise ValueError(f"lora_dropout: keys for {keys.numel()} rows, but the pass has {result.shape[0]}")
        factor = layer.scaling[name] / (1 - p) if keys is not None else layer.scaling[name]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if keys is None and not torch.is_grad_enabled():
            # Generating comes here for each token, where an op and an autograd function cost more than their work.
            _add_rows_(result, x, a, b, None, float(factor), self.place, p)
            return result
        return _LowRank.apply(result, x, a, b, keys, float(factor), self.place, p)


@cache
def _with_low_rank_forward(base: type) -> type:
    return type(f"LowRank{base.__name__}", (LowRankForward, base), {})


def use_low_rank_forward(model: nn.Module) -> None:
    """Give every LoRA layer of a PEFT model this module's forward, in place; a second call changes nothing.

    Raises:
        UserError: a kind of adapter whose forward is not plain LoRA (DoRA, a LoRA bias, an adapted embedding or 8-bit layer).
    """
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    keys = DropoutKeys()
    for place, (name, layer) in enumerate(layers):
        if isinstance(layer, LowRankForward):
            return
        if type(layer).__name__ not in ("Linear", "Linear4bit"):
            raise UserError(f"the adapter on {name} is of kind {type(layer).__name__}; only LoRA on linear and 4-bit layers can be trained")
        if layer.lora_variant or any(linear.bias is not None for linear in layer.lora_B.values()):
            raise UserError(f"the adapter on {name} is not plain LoRA (use_dora, lora_bias or another variant); train one without it")
        layer.__class__ = _with_low_rank_forward(layer.__class__)
        layer.dropout_keys, layer.place = keys, place


@contextmanager
def lora_dropout(model: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """LoRA's dropout, and only LoRA's, for the passes inside, their backward included (recomputed blocks read the keys again).

    A model's own dropout stays off: it would make the adapted pass differ from the reference at B = 0.

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
            raise UserError("this model has no LoRA adapter that can be trained; attach one first")
        yield
        return
    previous = shared.rows
    shared.rows = None if keys is None else keys.reshape(-1)
    try:
        yield
    finally:
        shared.rows = previous
