"""The whole loss in one graph: the benchmark's eager baseline, and what it lacks: the pair term and bounded
distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import eager_step
from benchmarks.baselines.batches import padded, unsafe_sequences, weighted_sum
from repbend_fast.data.records import Batch
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.rows import select_rows


def _states(model: Any, sequences: list[Any]) -> Tensor:
    ids, mask = padded(sequences)
    return torch.stack(
        model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    )


def _pair(model: Any, batch: Batch, config: RepBendConfig) -> Tensor:
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


def limited_rows(model: Any, batch: Batch, config: RepBendConfig) -> tuple[Tensor, Tensor]:
    """(‖h − r‖, limit·‖r‖) of each row of U, one by one."""
    sequences = unsafe_sequences(batch)
    h = _states(model, sequences)
    with torch.no_grad(), model.disable_adapter():
        r = _states(model, sequences)
    places = [
        (x, i, t)
        for x in config.window
        for i, s in enumerate(sequences)
        for t in range(*select_rows(s, config.loss_mode))
    ]
    norms = [
        (torch.linalg.vector_norm(h[p] - r[p]), config.unsafe_limit * torch.linalg.vector_norm(r[p])) for p in places
    ]
    return torch.stack([n[0] for n in norms]), torch.stack([n[1] for n in norms])


def eager_terms(model: Any, batch: Batch, config: RepBendConfig) -> dict[str, Tensor]:
    """S, U, C, K and, where it has a weight, P, by the names that the step gives them."""
    terms = eager_step.eager_terms(model, batch, config)
    if config.unsafe_limit:
        terms["unsafe"] = torch.minimum(*limited_rows(model, batch, config)).mean()
    return terms | {"pair": _pair(model, batch, config)} if config.pair else terms


def eager_loss(terms: dict[str, Tensor], config: RepBendConfig) -> Tensor:
    """α·S − β·U + γ·C + ε·K + η·P."""
    return weighted_sum(terms, config)
