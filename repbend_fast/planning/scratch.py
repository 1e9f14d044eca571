"""What operations need inside of themselves and free again, in bytes: no tensor outside shows it.

Figures follow the ops' own code (``repbend_kernels``, ``models.layers``, bitsandbytes' ``gemm_4bit``) and hold for shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from repbend_kernels.head import TILE_ELEMENTS, default_chunk_rows
from repbend_kernels.keyed_dropout import CPU_ELEMENTS_PER_THREAD as HASHES_PER_THREAD
from repbend_kernels.rows import CPU_ELEMENTS_PER_THREAD, DEVICE_ELEMENTS
from torch import Tensor

from repbend_fast.models.layers.block_ops import chunk_rows as block_chunk_rows
from repbend_fast.models.layers.lora import CHUNK_ELEMENTS, LEAST_ROWS
from repbend_fast.models.load import NF4_BLOCK
from repbend_fast.planning.tracker import Scratch

HEAD_OPS = frozenset({"repbend_kernels::linear_kl_div", "repbend_kernels::linear_log_prob"})
"""The ops whose chunk ``memory.kl_chunk_rows`` sets."""


def head_scratch(rows: int, vocabulary: int, width: int, itemsize: int, device: torch.device, chunk_rows: int | None) -> int:
    """Bytes inside ``linear_kl_div`` (and, no more than that, ``linear_log_prob``).

    Args:
        rows: rows that the head reads.
        itemsize: bytes of an element of the hidden states.
        chunk_rows: rows per chunk; None = the op's size rule.
    """
    chunk = min(chunk_rows or default_chunk_rows(rows, vocabulary, device), rows)
    buffers = 2 * 4 * chunk * vocabulary
    gradient = 2 * 4 * chunk * width
    if device.type == "cuda":
        return buffers + gradient
    block = max(1, CPU_ELEMENTS_PER_THREAD * torch.get_num_threads() // vocabulary)
    loss = 6 * 4 * min(block, chunk) * vocabulary
    # 16-bit operands are widened: the rows, and the weight in tiles.
    widened = (4 * chunk * width + 4 * TILE_ELEMENTS + 4 * chunk * max(1, TILE_ELEMENTS // width)) if itemsize < 4 else 0
    return buffers + max(loss, gradient + widened)


def op_scratch(device: torch.device) -> dict[str, Scratch]:
    """Scratch by operation name on ``device``, the head's ops apart (``head_scratch``)."""
    block = 4 * (DEVICE_ELEMENTS if device.type != "cpu" else CPU_ELEMENTS_PER_THREAD * torch.get_num_threads())

    def rows_in_blocks(args: tuple[Any, ...]) -> int:
        largest = max((4 * a.numel() for a in args if isinstance(a, Tensor)), default=0)
        return 4 * min(block, largest)

    def dequantized(args: tuple[Any, ...]) -> int:
        inputs, shape = args[0], args[2]
        count = int(shape[0]) * int(shape[1])
        # The weight in the dtype of computation; its scales in float32, before and after their offset is added.
        return int(count * inputs.element_size() + 2 * 4 * count // NF4_BLOCK)

    def chunk_rows(rows: Tensor) -> int:
        elements = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "other"]
        return min(max(LEAST_ROWS, elements // rows.shape[-1]), rows.shape[0])

    def low_rank_down(args: tuple[Any, ...]) -> int:
        # Chunks of rows of x [N, D] are masked, in backward together with what is added to their gradient, into copies; a 16-bit one is
        # widened on the way where the product is not the GPU's. In plain torch a block of 32-bit hashes lies beside them.
        x, a, keys = args[:3] if len(args) == 5 else (args[1], args[2], args[4])
        chunk = chunk_rows(x) * x.shape[-1]
        wide = 4 if device.type != "cuda" else x.element_size()
        narrow = 2 * wide * chunk if x.element_size() < 4 else 0
        hashes = 0 if device.type == "cuda" else 4 * min(HASHES_PER_THREAD * torch.get_num_threads(), chunk)
        masked = chunk * (x.element_size() + 2 * wide) + hashes
        return int((narrow if keys is None else masked) + 2 * 4 * a.numel())

    def low_rank_up(args: tuple[Any, ...]) -> int:
        # A product of 16-bit rows [n, O] with 32-bit ones: their parts side by side on CUDA, elsewhere the rows widened, twice.
        rows, down, b = args[:3]
        small = 4 * (down.numel() + 2 * b.numel())
        if rows.element_size() >= 4:
            return int(small)
        width = 6 * down.shape[-1] if device.type == "cuda" else 8 * rows.shape[-1]
        return int(small + chunk_rows(rows) * width)

    def norm(args: tuple[Any, ...]) -> int:
        # Of a chunk, in 32 bits: the row widened, normed and scaled, in backward the incoming gradient and a product too.
        x = args[0] if len(args) == 4 else args[1]
        return int(16 * min(block_chunk_rows(x, device), x.shape[0]) * x.shape[1])

    def gated(args: tuple[Any, ...]) -> int:
        # The activation of a chunk, in backward two such.
        rows = args[0]
        return int(2 * rows.element_size() * min(block_chunk_rows(rows, device), rows.shape[0]) * rows.shape[1])

    in_blocks = ("bend_tap_forward", "bend_tap_backward", "add_rows", "row_distance_forward", "pairwise_similarity")
    scratch: dict[str, Scratch] = {f"repbend_kernels::{name}": rows_in_blocks for name in in_blocks}
    scratch |= {f"repbend_fast::{name}": low_rank_down for name in ("low_rank_down", "add_low_rank_gradient_")}
    scratch |= {f"repbend_fast::{name}": low_rank_up for name in ("add_low_rank_up_", "low_rank_up_gradients")}
    scratch |= {f"repbend_fast::{name}": norm for name in ("rms_norm", "rms_norm_gradient")}
    scratch |= {f"repbend_fast::{name}": gated for name in ("gated_product", "gated_product_gradients")}
    return scratch | {"bitsandbytes::gemm_4bit": dequantized}
