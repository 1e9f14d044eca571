"""Baseline ``peft+liger``: what a good engineer writes in an afternoon on PEFT, transformers and Liger.

Forward hooks take the layers that the loss reads and keep its rows only; streams are padded to their own longest
sequence; each stream is differentiated before the next; only the retain stream meets the head, through Liger's fused
loss; blocks are recomputed in backward. Every pass runs all blocks, with a padding mask. On CUDA Liger's layers replace
the model's own (the benchmark sees to it); its Triton loss needs CUDA, so on a CPU Liger's chunked loss in plain torch
takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
from benchmarks.baselines.heads import liger_chunked_kl, liger_fused_kl
from repbend_fast.data.records import Batch, Sequence
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.objectives.repbend import RepBendConfig


def prepare_peft_liger(model: AdaptedLM) -> None:
    """Train mode (LoRA's dropout) with every block recomputed in backward."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def peft_liger_step(model: AdaptedLM, batch: Batch, config: RepBendConfig) -> dict[str, Tensor]:
    """One step: the gradient of the weighted sum is added to the adapter's parameters; returns the unweighted terms S,
    U, C, K.
    """
    terms: dict[str, Tensor] = {}
    for stream in (_safe, _unsafe, _retain):
        found = stream(model, batch, config)
        weighted_sum(found, config).backward()
        terms |= {name: value.detach() for name, value in found.items()}
    return terms


def _safe(model: AdaptedLM, batch: Batch, config: RepBendConfig) -> dict[str, Tensor]:
    sequences = safe_sequences(batch, config)
    ids, mask = padded(sequences, device=model.device)
    rows = row_mask(sequences, config.loss_mode, device=model.device)
    every = config.alpha_mode == "all"
    # The embedding's distance is zero; it counts in the mean.
    layers = list(range(1, model.config.get_text_config().num_hidden_layers + 1)) if every else list(config.window)
    reference = _reference_rows(model, ids, mask, layers, rows)
    states = _hidden_states(model, ids, mask, layers)
    return {"safe": _distance(states, reference, rows, len(layers) + every)}


def _unsafe(model: AdaptedLM, batch: Batch, config: RepBendConfig) -> dict[str, Tensor]:
    sequences, layers = unsafe_sequences(batch), list(config.window)
    ids, mask = padded(sequences, device=model.device)
    rows = unsafe_row_mask(batch, config, device=model.device)
    reference = _reference_rows(model, ids, mask, layers, rows)
    states = _hidden_states(model, ids, mask, layers)
    prompts = torch.stack([prompt_states(states[x], sequences) for x in layers])
    return {"unsafe": _distance(states, reference, rows, len(layers)), "cosine": published_pairwise_cosine(prompts)}


def _retain(model: AdaptedLM, batch: Batch, config: RepBendConfig) -> dict[str, Tensor]:
    sequences: list[Sequence] = list(batch.retain)
    ids, mask = padded(sequences, device=model.device)
    real = mask.bool()
    last = model.config.get_text_config().num_hidden_layers
    reference = _reference_rows(model, ids, mask, [last], real)[last]
    hidden = _hidden_states(model, ids, mask, [last])[last][real]
    fused = liger_fused_kl if hidden.is_cuda else liger_chunked_kl
    loss = fused(hidden, reference, model.get_output_embeddings().weight, config.temperature)
    return {"kl": loss / kl_count(sequences, config)}


def _reference_rows(model: AdaptedLM, ids: Tensor, mask: Tensor, layers: list[int], rows: Tensor) -> dict[int, Tensor]:
    with torch.no_grad(), model.disable_adapter():
        return {layer: hidden[rows] for layer, hidden in _hidden_states(model, ids, mask, layers).items()}


def _hidden_states(model: AdaptedLM, ids: Tensor, mask: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """The wanted hidden states [B, T, D] by index; the head does not run."""
    body: Any = model.get_base_model().get_decoder()
    with _captured(body, layers) as states:
        states[len(body.layers)] = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return {layer: states[layer] for layer in layers}


@contextmanager
def _captured(body: Any, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """Hooks for one forward. They are gone before backward, whose recomputation would overwrite what they took."""
    states: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    places: list[tuple[int, nn.Module]] = [
        (0, body.embed_tokens),
        *((i + 1, block) for i, block in enumerate(body.layers[:-1])),
    ]
    handles = [module.register_forward_hook(hook_of(layer)) for layer, module in places if layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _distance(states: dict[int, Tensor], reference: dict[int, Tensor], rows: Tensor, counted: int) -> Tensor:
    total = torch.zeros((), device=rows.device)
    for layer, kept in reference.items():
        total = total + torch.norm(states[layer][rows] - kept, dim=-1, p=2, dtype=torch.float).sum()
    return total / (rows.sum() * counted)
