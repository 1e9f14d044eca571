"""The whole loss written plainly from its equations, in one graph: the benchmark's eager baseline, and the pair term it lacks."""

from __future__ import annotations

from typing import Any

import torch
from baselines import eager_step
from baselines.batches import padded, weighted_sum
from torch import Tensor

from repbend_fast.config.schema import ObjectiveConfig
from repbend_fast.data.records import Batch


def _states(model: Any, sequences: list[Any]) -> Tensor:
    ids, mask = padded(sequences)
    return torch.stack(model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states)


def _pair(model: Any, batch: Batch, config: ObjectiveConfig) -> Tensor:
    h = _states(model, [p.unsafe for p in batch.pairs])
    with torch.no_grad(), model.disable_adapter():
        r = _states(model, [p.safe for p in batch.pairs])
    values = []
    for i, p in enumerate(batch.pairs):
        start = p.unsafe.prompt_length - 1
        count = min(config.pair_positions, len(p.unsafe) - start, len(p.safe) - start)
        for layer in config.window:
            values += [torch.linalg.vector_norm(h[layer, i, t] - r[layer, i, t]) for t in range(start, start + count)]
    return torch.stack(values).mean()


def eager_terms(model: Any, batch: Batch, config: ObjectiveConfig) -> dict[str, Tensor]:
    """S, U, C, K and, where it has a weight, P, by the names that the step gives them."""
    terms = eager_step.eager_terms(model, batch, config)
    return terms | {"pair": _pair(model, batch, config)} if config.pair else terms


def eager_loss(terms: dict[str, Tensor], config: ObjectiveConfig) -> Tensor:
    """α·S − β·U + γ·C + ε·K + η·P."""
    return weighted_sum(terms, config)
