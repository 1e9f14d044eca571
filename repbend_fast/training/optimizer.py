"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from repbend_fast.config.schema import TrainingConfig
from repbend_fast.errors import UserError

BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def check_optimizer(config: TrainingConfig, device: torch.device) -> None:
    """What ``build_optimizer`` needs of the device, asked before any weight is loaded.

    Raises:
        UserError: the chosen optimizer does not run there.
    """
    if config.optimizer.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"training.optimizer={config.optimizer} pages between GPU and CPU memory and needs CUDA; use adamw or "
            "adamw_8bit"
        )
    if config.optimizer != "adamw" and device.type not in ("cuda", "cpu"):
        raise UserError(f"training.optimizer={config.optimizer} is not there for {device.type}; use adamw")


def build_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """torch's AdamW, or bitsandbytes' 8-bit and paged ones.

    Raises:
        UserError: the chosen optimizer does not run on this device.
    """
    settings = _settings(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=_is_fused(parameters), **settings)
    check_optimizer(config, parameters[0].device)
    import bitsandbytes as bnb

    return getattr(bnb.optim, BITSANDBYTES[config.optimizer])(parameters, **settings)


def learning_rate(config: TrainingConfig, finished: int, anneal: range | None = None) -> float:
    """The learning rate of the step after ``finished`` ones.

    A linear warm-up from 0, then ``constant``, or down to 0 at ``steps`` along a line or half a cosine, as transformers
    defines them; with ``decay_steps`` its warmup-stable-decay, which falls over these last steps alone.

    Args:
        anneal: steps over which it falls along a line from its value at ``anneal.start`` to 0 at ``anneal.stop``, or at
            ``steps`` if that is sooner. A schedule that is at 0 by then stays as it is.
    """
    if anneal is None or finished < anneal.start or (anneal.stop >= config.steps and config.schedule != "constant"):
        return _scheduled(config, finished)
    stop = min(anneal.stop, config.steps)
    return _scheduled(config, anneal.start) * max(0, stop - finished) / max(1, stop - anneal.start)


def _scheduled(config: TrainingConfig, finished: int) -> float:
    if finished < config.warmup_steps:
        return config.learning_rate * finished / config.warmup_steps
    start = config.warmup_steps
    if config.decay_steps is not None:
        start = max(start, config.steps - config.decay_steps)
    progress = max(0, finished - start) / max(1, config.steps - start)
    factor = {"constant": 1.0, "linear": max(0.0, 1 - progress), "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        config.schedule
    ]
    return config.learning_rate * factor


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, object], config: TrainingConfig) -> None:
    """Put saved moments into the optimizer.

    Betas, eps and weight decay stay the configuration's, as the learning rate does: a user who resumes with others gets
    them.
    """
    if config.optimizer.startswith("paged"):
        _load_paged(optimizer, saved)
    elif isinstance(optimizer, torch.optim.AdamW):
        # By them, not by what was saved, torch decides on which device the number of steps lies.
        fused = {"fused": optimizer.param_groups[0]["fused"]}
        groups = cast("list[dict[str, object]]", saved["param_groups"])
        optimizer.load_state_dict(saved | {"param_groups": [group | fused for group in groups]})
    else:
        optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group.update(_settings(config))


def _load_paged(optimizer: Any, saved: dict[str, object]) -> None:
    """Put large moments into paged memory again: bitsandbytes itself would load all of them as ordinary tensors of the
    device.
    """
    optimizer.load_state_dict(saved, move_to_device=False)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name in ("state1", "state2"):
                state[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                state[name] = value.to(parameter.device)


def _is_fused(parameters: list[nn.Parameter]) -> bool | None:
    """One launch for all parameters of a dtype, in the place of one for each operation. On a CPU torch's own choice."""
    return True if all(p.is_cuda for p in parameters) else None


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
