"""Baseline ``eager``: the published RepBend step written plainly.

    L = α·S − β·U + γ·C + ε·K

Every pass returns all hidden states and all logits; every stream is padded to one fixed width and masked; the layers
are stacked and masked as a whole; reference stacks and reference logits of all streams are kept; all adapted streams
stay alive until one backward. Norms are taken in at least float32, as the published code does. Blocks are recomputed in
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.batches import (
    kl_count,
    padded,
    prompt_states,
    row_mask,
    safe_sequences,
    unsafe_row_mask,
    unsafe_sequences,
    weighted_sum,
)
from benchmarks.baselines.distances import published_pairwise_cosine
from benchmarks.baselines.heads import kl_of_logits
from repbend_fast.data.records import Batch
from repbend_fast.models.causal import AdaptedLM, Output
from repbend_fast.objectives.repbend import RepBendConfig


def prepare_eager(model: AdaptedLM) -> None:
    """Train mode (LoRA's dropout) with every block recomputed in backward."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def eager_step(model: AdaptedLM, batch: Batch, config: RepBendConfig, width: int | None = None) -> dict[str, Tensor]:
    """One step: the gradient of the weighted sum is added to the adapter's parameters; returns the unweighted terms S,
    U, C, K.

    Args:
        width: tokens that every sequence is padded to; None pads each stream to its longest.
    """
    terms = eager_terms(model, batch, config, width)
    weighted_sum(terms, config).backward()
    return {name: value.detach() for name, value in terms.items()}


def eager_terms(model: AdaptedLM, batch: Batch, config: RepBendConfig, width: int | None = None) -> dict[str, Tensor]:
    """S, U, C, K as scalars of one graph over all streams."""
    device = next(model.parameters()).device
    safe, unsafe, retain = safe_sequences(batch, config), unsafe_sequences(batch), list(batch.retain)
    safe_input, unsafe_input, retain_input = (padded(s, width, device) for s in (safe, unsafe, retain))
    safe_rows = row_mask(safe, config.loss_mode, width, device)
    unsafe_rows = unsafe_row_mask(batch, config, width, device)
    window = list(config.window)
    safe_layers = (
        list(range(model.config.get_text_config().num_hidden_layers + 1)) if config.alpha_mode == "all" else window
    )

    with torch.no_grad(), model.disable_adapter():
        safe_reference = _masked_stack(_run(model, safe_input).hidden_states, safe_layers, safe_rows)
        unsafe_reference = _masked_stack(_run(model, unsafe_input).hidden_states, window, unsafe_rows)
        reference_logits = _masked_logits(model, retain_input)

    safe_states = _masked_stack(_run(model, safe_input).hidden_states, safe_layers, safe_rows)
    terms = {"safe": _distance(safe_states, safe_reference, safe_rows)}
    unsafe_states = _run(model, unsafe_input).hidden_states
    terms["unsafe"] = _distance(_masked_stack(unsafe_states, window, unsafe_rows), unsafe_reference, unsafe_rows)
    terms["cosine"] = published_pairwise_cosine(prompt_states(torch.stack([unsafe_states[x] for x in window]), unsafe))
    terms["kl"] = kl_of_logits(_masked_logits(model, retain_input), reference_logits, config.temperature) / kl_count(
        retain, config
    )
    return terms


def _run(model: AdaptedLM, inputs: tuple[Tensor, Tensor]) -> Output:
    return model(input_ids=inputs[0], attention_mask=inputs[1], output_hidden_states=True, use_cache=False)


def _masked_stack(states: tuple[Tensor, ...], layers: list[int], rows: Tensor) -> Tensor:
    """[layers, B, T, D] with zeros in the rows that are not selected."""
    stacked = torch.stack([states[x] for x in layers])
    stacked *= rows[..., None]
    return stacked


def _masked_logits(model: AdaptedLM, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Logits [B, T, V], zero on padding, where both distributions are then uniform."""
    logits: Tensor = _run(model, inputs).logits
    return logits * inputs[1][..., None]


def _distance(states: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
    norm_dtype = torch.promote_types(states.dtype, torch.float32)
    return torch.norm(states - reference, dim=-1, p=2, dtype=norm_dtype).sum() / (rows.sum() * states.shape[0])
