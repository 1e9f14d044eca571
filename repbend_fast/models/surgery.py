"""What a model goes through before a step runs on it, in one place and one order, and back.

    blocks divided  →  attention  →  Liger's layers  →  NF4 products  →  low-rank forwards  →  lean forwards
    →  LoRA's dropout rate  →  embedding and head to the host

Each mechanism stands in a file of its own under ``layers/`` and makes its changes through ``layers.changes``;
``Prepared.restore`` takes them back in reverse order. The module tree, parameters and what requires a gradient stay the
same objects throughout. Beside these there are switches that each pass sets for itself and puts back when it ends:
``layers.truncated`` (the list of blocks, the final norm), ``layers.switches`` (adapter off, mode, generation),
and ``layers.lora.lora_dropout`` (the rows' keys); one that a step sets, ``layers.rounded_passes`` (weights as they are
once merged and rounded); and two that attacks set on a model that no step
runs on: ``layers.stacked`` (fresh low-rank parts) and ``layers.rounded`` (weights merged and rounded, which come back
to the bit). Nothing else changes a model once it is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import Decoder, find_decoder
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.lean import use_lean_layers
from repbend_fast.models.layers.liger import Setting, use_liger
from repbend_fast.models.layers.lora import set_dropout_rate, use_low_rank_forward
from repbend_fast.models.layers.nf4 import use_nf4_products
from repbend_fast.models.layers.offload import offload_embedding
from repbend_fast.models.layers.sharded import shard_blocks
from repbend_fast.models.layers.varlen import use_masks, use_varlen
from repbend_fast.models.load import settle_device


class ModelLevers(Protocol):
    """The levers that concern the model itself: ``step.levers.Levers`` has them among others."""

    @property
    def offload_embedding(self) -> bool:
        """Whether input embedding and head live in host memory."""


@dataclass(frozen=True)
class Prepared:
    """A model that steps may run on. Left as a context, or restored, it is the model that it was."""

    model: CausalLM
    decoder: Decoder
    changes: Changes

    @property
    def device(self) -> torch.device:
        """Where the decoder computes."""
        return self.decoder.device

    def mask_rows(self) -> None:
        """Have sequences that share a row told apart by a mask, where attention does it otherwise."""
        use_masks(self.decoder.body, self.changes)

    def restore(self) -> None:
        """Take back what preparing changed; a second call does nothing. Runners built on the model must not run any
        more.
        """
        self.changes.undo()

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def prepared(
    model: CausalLM,
    levers: ModelLevers,
    *,
    liger: Setting = False,
    dropout: float | None = None,
    shards: torch.device | None = None,
) -> Prepared:
    """Prepare ``model`` in place. What is prepared already stays as it is, and is not undone by this call's
    ``restore``.

    Args:
        model: PEFT model with the trained adapter.
        liger: as ``model.liger``.
        dropout: LoRA's dropout rate in place of the adapter's own; None keeps that.
        shards: divide the frozen weights of the blocks among the processes, each part on this device; ``restore``
            leaves that as it is, since the whole may fit nowhere.

    Raises:
        UserError: an adapter, a head or a family that a mechanism cannot work with; the model is as before.
    """
    decoder = find_decoder(model)
    if shards is not None:
        shard_blocks(model, decoder.layers, shards)
    # Of the process, not of the model: another model may rely on it, so it stays.
    settle_device(decoder.device)
    changes = Changes()
    try:
        use_varlen(decoder.body, decoder.device, changes)
        use_liger(model, liger, decoder.device, changes)
        use_nf4_products(model, decoder.device, changes)
        use_low_rank_forward(model, changes)
        use_lean_layers(model, changes)
        if dropout is not None:
            set_dropout_rate(model, dropout, changes)
        if levers.offload_embedding and has_own_memory(decoder.device):
            offload_embedding(model, changes)
    except BaseException:
        changes.undo()
        raise
    return Prepared(model, decoder, changes)


def has_own_memory(device: torch.device) -> bool:
    """Whether something can leave the device for host memory: on the CPU everything is there as it is."""
    return device.type != "cpu"
