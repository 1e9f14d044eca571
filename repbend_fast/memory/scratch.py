"""What operations need inside of themselves and free again, in bytes: no tensor outside shows it.

Figures follow the ops' own code (``repbend_kernels``, bitsandbytes' ``gemm_4bit``) and hold for shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from repbend_kernels.head import TILE_ELEMENTS, default_chunk_rows
from repbend_kernels.rows import CPU_ELEMENTS_PER_THREAD, DEVICE_ELEMENTS
from torch import Tensor

from repbend_fast.memory.tracker import Scratch

HEAD_OPS = frozenset({"repbend_kernels::linear_kl_div", "repbend_kernels::linear_log_prob"})
"""The ops whose chunk ``memory.kl_chunk_rows`` sets."""

NF4_BLOCK = 64


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

    in_blocks = ("bend_tap_forward", "bend_tap_backward", "add_rows", "row_distance_forward", "pairwise_similarity")
    return {f"repbend_kernels::{name}": rows_in_blocks for name in in_blocks} | {"bitsandbytes::gemm_4bit": dequantized}
