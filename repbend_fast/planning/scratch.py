"""What operations need inside of themselves and free again, in bytes: no tensor outside shows it.

The rules of the project's own ops stand beside them (``repbend_kernels.scratch``); bitsandbytes' ``gemm_4bit`` has its
rule here. All hold for shapes alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from repbend_kernels.scratch import scratch_bytes, scratch_rules

from repbend_fast.models.load import NF4_BLOCK
from repbend_fast.planning.tracker import Scratch

HEAD_OPS = frozenset(
    f"repbend_kernels::{name}" for name in ("linear_kl_div", "linear_log_prob", "linear_lowered_label")
)
"""The ops whose chunk ``memory.kl_chunk_rows`` sets."""


def op_scratch(device: torch.device) -> dict[str, Scratch]:
    """Scratch by operation name on ``device``, the head's ops apart (``head_scratch``)."""
    scratch: dict[str, Scratch] = {
        name: partial(scratch_bytes, name, device) for name in scratch_rules() if name not in HEAD_OPS
    }
    return scratch | {"bitsandbytes::gemm_4bit": _dequantized}


def _dequantized(args: tuple[Any, ...]) -> int:
    inputs, shape = args[0], args[2]
    count = int(shape[0]) * int(shape[1])
    # The weight in the dtype of computation; its scales in float32, before and after their offset is added.
    return int(count * inputs.element_size() + 2 * 4 * count // NF4_BLOCK)
