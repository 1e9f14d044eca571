"""The output head in row chunks: logits in float32, the way back to the hidden state, and the rule for the chunk size.

Logits of bf16 operands leave the GEMM in float32 (rounding them to bf16 first costs 4 to 23 % of the gradient where two
distributions are close). On CUDA the GEMM itself writes float32; elsewhere the operands are cast, the weight in tiles.

Legend: n rows of a chunk, H width of a hidden state, V vocabulary.
"""

import torch
from torch import Tensor

from . import checks
from .rows import CPU_ELEMENTS_PER_THREAD, scale_into

# Bytes of one (chunk × vocabulary) float32 buffer: a head of 128k words takes 512 rows on CUDA and 32 on a CPU, large
# enough for the GEMM to run at its rate and small enough to sit beside a model.
CHUNK_BYTES = {"cuda": 256 << 20, "other": 16 << 20}
# Weight elements cast to float32 at a time where the GEMM cannot take 16-bit operands to a float32 result.
TILE_ELEMENTS = 1 << 21
# A GPU's matrix product works on tiles of so many rows; a part of a tile costs a whole one.
TILE_ROWS = {"cuda": 128, "other": 16}
# Rows of logits begin at multiples of so many elements, so that a 16-bit gradient packed into them is aligned for the
# GEMM back, whatever the vocabulary is.
ROW_ALIGNMENT = 16


def default_chunk_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """Rows per chunk: as many as fit ``CHUNK_BYTES`` in whole tiles (``TILE_ROWS``), at least one tile, at most
    ``rows``.
    """
    kind = "cuda" if device.type == "cuda" else "other"
    tile = TILE_ROWS[kind]
    fitting = max(tile, CHUNK_BYTES[kind] // (4 * vocabulary) // tile * tile)
    return max(1, min(rows, fitting))


def head_chunks(rows: int, chunk_rows: int, device: torch.device) -> list[tuple[int, int]]:
    """First and last + 1 of each chunk. The last one takes in a tail of less than a tile, and of at most a quarter of a
    chunk: the products of a few rows would read the whole weight once more.
    """
    step = max(1, min(chunk_rows, rows))
    starts = list(range(0, rows, step))
    tail = rows - starts[-1] if starts else 0
    if len(starts) > 1 and tail < TILE_ROWS["cuda" if device.type == "cuda" else "other"] and 4 * tail <= step:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows]))


def largest_chunk(chunks: list[tuple[int, int]]) -> int:
    """Rows of the largest of them."""
    return max((stop - start for start, stop in chunks), default=0)


def logit_buffers(count: int, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """``count`` tensors [rows, V] for logits, unfilled; see ``ROW_ALIGNMENT``."""
    width = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return [buffer[:, :vocabulary] for buffer in torch.empty((count, rows, width), dtype=dtype, device=device)]


def logit_gradient_scale(dtype: torch.dtype, largest: float) -> float:
    """Factor on gradients of logits (at most ``largest``) that are kept in ``dtype`` for the GEMM back; divide by it
    afterwards.

    float16 alone needs one: most of a vocabulary's gradients lie below its smallest subnormal, 6e-8.
    """
    return 2.0**14 / max(largest, 1.0) if dtype == torch.float16 else 1.0


def stored_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which forward keeps a gradient for backward: float32 for float16, whose range would lose it before a
    loss scaler.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def log_softmax_(logits: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor | None]:
    """In place: logits → log softmax over the temperature; returns the softmax, and 1 − (z/c)² where there is a
    soft-cap c.
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(softcap)
    logits.div_(temperature)
    # The maximum leaves before the logarithm comes: one rounding of a large log-sum would scale a whole row's softmax.
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    softmax = logits.exp()
    total = softmax.sum(dim=-1, keepdim=True)
    logits.sub_(total.log())
    return softmax.div_(total), slope


def hidden_rows(hidden: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    """Selected rows ``start … stop-1`` of ``hidden`` [N, H]: of all rows a view, of those that ``rows``
    names a copy.
    """
    return hidden[start:stop] if rows is None else hidden.index_select(0, rows[start:stop])


def scaled_gradient(grad: Tensor, factor: Tensor, rows: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    """New [N, H] in ``dtype``: the kept gradient [R, H] times ``factor`` at ``rows``, 0 elsewhere; N is ``count``."""
    allocate = torch.empty if rows is None else torch.zeros
    out = allocate((count, grad.shape[1]), dtype=dtype, device=grad.device)
    return scale_into(out, grad, factor, rows)


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [n, V] = hidden [n, H] · weight [V, H]ᵀ + bias [V], in ``out``'s dtype (float32 or float64)."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start, stop in _tiles(weight):
            out[:, start:stop] = wide @ weight[start:stop].to(out.dtype).T
    if bias is not None:
        out.add_(bias)


def hidden_gradient(grad_logits: Tensor, weight: Tensor, acc: torch.dtype) -> Tensor:
    """New [n, H] in ``acc``: grad_logits [n, V] · weight [V, H]. grad_logits has ``acc`` or the weight's dtype."""
    if weight.dtype == acc:
        return grad_logits @ weight
    if grad_logits.dtype == weight.dtype:
        return torch.mm(grad_logits, weight, out_dtype=acc) if weight.is_cuda else grad_logits.to(acc) @ weight.to(acc)
    out = torch.zeros((grad_logits.shape[0], weight.shape[1]), dtype=acc, device=weight.device)
    for start, stop in _tiles(weight):
        out.addmm_(grad_logits[:, start:stop], weight[start:stop].to(acc))
    return out


def store_gradient(out: Tensor, grad_logits: Tensor, weight: Tensor, acc: torch.dtype, largest: float) -> None:
    """``out`` [n, H] = :func:`hidden_gradient`, without the factor of :func:`logit_gradient_scale` for ``largest``."""
    scale = logit_gradient_scale(grad_logits.dtype, largest)
    found = hidden_gradient(grad_logits, weight, acc)
    out.copy_(found if scale == 1.0 else found.div_(scale))


def takes_narrow(device: torch.device) -> bool:
    """Whether a matrix product there takes 16-bit operands to a float32 result, at a rate that float32 ones lack."""
    return device.type == "cuda"


def autocast_operands(*operands: Tensor) -> list[Tensor]:
    """Operands of a head's product: under autocast float32 ones in its dtype, where the device's products take those.

    The logits stay in float32, as they are for states and a head that have 16 bits.
    """
    device = operands[0].device
    if operands[0].dtype != torch.float32 or not takes_narrow(device) or not torch.is_autocast_enabled(device.type):
        return list(operands)
    return [operand.to(torch.get_autocast_dtype(device.type)) for operand in operands]


def _tiles(weight: Tensor) -> list[tuple[int, int]]:
    step = max(1, TILE_ELEMENTS // weight.shape[1])
    return [(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step)]


def check_head(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    chunk_rows: int | None,
) -> int:
    """``hidden`` [N, H], ``rows`` [R], ``weight`` [V, H], ``bias`` [V] fit; weight and bias require no gradient.
    Returns R, or N.
    """
    checks.check_float("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: expected shape [N, H], got {list(hidden.shape)}")
    check_weight("weight", weight, hidden)
    check_bias("bias", bias, weight, hidden)
    checks.check_positive("temperature", temperature)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    if rows is None:
        return hidden.shape[0]
    checks.check_indices("rows", rows, hidden.shape[0], "hidden", hidden)
    checks.check_unique("rows", rows)
    return rows.shape[0]


def check_weight(name: str, weight: Tensor, hidden: Tensor) -> None:
    """``weight`` is [V, H] like ``hidden`` and requires no gradient."""
    checks.check_like(name, weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"{name}: expected shape [V, {hidden.shape[1]}] (vocabulary, width of hidden), got {list(weight.shape)}"
        )
    checks.check_constant(name, weight)


def check_bias(name: str, bias: Tensor | None, weight: Tensor, hidden: Tensor) -> None:
    """``bias`` is None or [V] like ``hidden`` and requires no gradient."""
    if bias is None:
        return
    checks.check_like(name, bias, "hidden", hidden)
    checks.check_shape(name, bias, [weight.shape[0]], "vocabulary")
    checks.check_constant(name, bias)


def head_scratch(
    rows: int,
    vocabulary: int,
    width: int,
    itemsize: int,
    device: torch.device,
    chunk_rows: int | None,
    *,
    autocast: bool = False,
) -> int:
    """Bytes inside ``linear_kl_div`` (and, no more than that, ``linear_log_prob``).

    Args:
        rows: rows that the head reads.
        itemsize: bytes of an element of the hidden states.
        chunk_rows: rows per chunk; None = the op's size rule.
        autocast: whether the public function is called under it, which may make 16-bit copies of its operands.
    """
    chunk = largest_chunk(head_chunks(rows, chunk_rows or default_chunk_rows(rows, vocabulary, device), device))
    buffers = 2 * 4 * chunk * vocabulary
    gradient = 2 * 4 * chunk * width
    if autocast and itemsize == 4 and takes_narrow(device):
        gradient += 2 * width * (vocabulary + 2 * rows)
    if device.type == "cuda":
        return buffers + gradient
    block = max(1, CPU_ELEMENTS_PER_THREAD * torch.get_num_threads() // vocabulary)
    loss = 6 * 4 * min(block, chunk) * vocabulary
    # 16-bit operands are widened: the rows, and the weight in tiles.
    widened = (
        (4 * chunk * width + 4 * TILE_ELEMENTS + 4 * chunk * max(1, TILE_ELEMENTS // width)) if itemsize < 4 else 0
    )
    return buffers + max(loss, gradient + widened)
