"""Baseline ``eager`` of Circuit Breakers: the published step written plainly.

    L = c_r·mean ‖h − r‖₂ (all hidden states of retain) + c_f·mean relu(cos(h, r)) (some of forget)

Every pass returns all hidden states and all logits; both streams are padded to one fixed width and masked; layers are
stacked and masked as a whole; the reference stacks of both streams are kept, and both adapted streams stay alive until
one backward. Blocks are recomputed in backward. Padding counts in the retain mean where the settings say
``published_quirks``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from benchmarks.baselines.batches import padded, unsafe_sequences
from repbend_fast.data.records import Batch
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig


def circuit_breaker_step(
    model: AdaptedLM, batch: Batch, config: CircuitBreakerConfig, progress: float, width: int | None = None
) -> dict[str, Tensor]:
    """One step at t/(2T) = ``progress``: adds the gradient to the adapter's parameters; returns the unweighted terms.

    Args:
        width: tokens that every sequence is padded to; None pads each stream to its longest.
    """
    terms = circuit_breaker_terms(model, batch, config, width)
    loss = config.coefficient * (progress * terms["retain"] + (1 - progress) * terms["reroute"])
    loss.backward()
    return {name: value.detach() for name, value in terms.items()}


def circuit_breaker_terms(
    model: AdaptedLM, batch: Batch, config: CircuitBreakerConfig, width: int | None = None
) -> dict[str, Tensor]:
    """Both means as scalars of one graph over both streams."""
    device = next(model.parameters()).device
    retain_ids, retain_mask = padded(list(batch.retain), width, device)
    forget_ids, forget_mask = padded(unsafe_sequences(batch), width, device)
    with torch.no_grad(), model.disable_adapter():
        retain_reference = torch.stack(_states(model, retain_ids, retain_mask))
        retain_rows = retain_mask.repeat(len(retain_reference), 1, 1)[..., None]
        retain_reference *= retain_rows
        forget_reference = _layers(model, forget_ids, forget_mask, config)

    retain_states = torch.stack(_states(model, retain_ids, retain_mask)) * retain_rows
    distances = torch.norm(retain_states - retain_reference, dim=-1, p=2, dtype=_norm_dtype(retain_states))
    retain = distances.mean() if config.published_quirks else distances.sum() / retain_rows.sum()

    forget_states = _layers(model, forget_ids, forget_mask, config)
    forget_rows = forget_mask.repeat(len(config.layers), 1, 1)[..., None]
    product = (_normalised(forget_states) * _normalised(forget_reference)) * forget_rows
    reroute = torch.relu(product.sum(dim=-1)).sum() / forget_rows.sum()
    return {"reroute": reroute, "retain": retain}


def _states(model: AdaptedLM, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return states


def _layers(model: AdaptedLM, ids: Tensor, mask: Tensor, config: CircuitBreakerConfig) -> Tensor:
    states = _states(model, ids, mask)
    return torch.stack([states[layer] for layer in cast(list[int], config.layers)])


def _normalised(states: Tensor) -> Tensor:
    return states / torch.norm(states, dim=-1, keepdim=True, dtype=_norm_dtype(states))


def _norm_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
