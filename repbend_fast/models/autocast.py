"""The dtype that both passes compute in."""

from __future__ import annotations

import torch

from repbend_fast.config import Config


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """``training.autocast`` on ``device``: bfloat16, or None for the weights' own dtype.

    ``auto`` is bfloat16 for float32 weights where the device multiplies in it natively; elsewhere it would be slower
    than float32.
    """
    setting = config.training.autocast
    if setting == "auto":
        return torch.bfloat16 if config.model.dtype == "float32" and _native(device) else None
    return torch.bfloat16 if setting == "bfloat16" else None


def _native(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # A card that is planned for and not there: all that the planner knows have it.
    return device.type == "cuda" and (
        not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    )
