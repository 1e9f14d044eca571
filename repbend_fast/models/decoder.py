"""The parts of a causal LM that a truncated, tapped pass needs, and that pass itself.

One mechanism for every family: for one pass ``decoder.layers`` is a shortened list of thin wrappers (block, checkpoint,
tap) that delegate attributes (``layers.truncated``); it is restored afterwards. Hidden-state indices are Hugging
Face's: 0 is the embedding output, *l* the output of block *l − 1*, the last one the output after the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.layers.packing import known_packing
from repbend_fast.models.layers.truncated import OffloadedInputs, Visit, truncated

NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm", "final_norm", "norm_f")
"""What families call their final norm. A truncated pass leaves it out; under another name it runs, and its
result is not used.
"""


@dataclass(frozen=True)
class Decoder:
    """``body`` embeds, runs ``layers`` and applies its final norm (attribute ``norm_name``, None where it has an
    unknown name).
    """

    body: nn.Module
    norm_name: str | None

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers  # type: ignore[return-value]

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the blocks compute; the embedding may live elsewhere."""
        return next(self.layers.parameters()).device


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap · tanh((W h + b) / softcap), or W h + b without a soft-cap. ``weight`` is [V,
    D].
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def on(self, device: torch.device) -> Head:
        """The head on a device. Where its weight lives in host memory this is a copy, which is freed with the returned
        head.
        """
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True)
        return Head(self.weight.to(device, non_blocking=True), bias, self.softcap)


def causal_model(model: CausalLM) -> CausalLM:
    """The transformers model inside an optional PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_decoder(model: CausalLM) -> Decoder:
    """Locate the decoder of any transformers causal LM.

    Raises:
        UserError: the architecture keeps its decoder blocks in no list named ``layers``.
    """
    causal = causal_model(model)
    found = causal.get_decoder()
    # Some families' get_decoder() gives back the causal LM itself.
    for body in (found, getattr(found, "model", None), getattr(causal, "model", None)):
        if isinstance(body, nn.Module) and isinstance(getattr(body, "layers", None), nn.ModuleList):
            name = next((name for name in NORM_NAMES if isinstance(getattr(body, name, None), nn.Module)), None)
            return Decoder(body, name)
    kind = getattr(causal.config, "model_type", type(causal).__name__)
    lists = [
        f"{name} ({len(part)})"
        for name, part in found.named_modules()
        if isinstance(part, nn.ModuleList) and "." not in name
    ]
    raise UserError(
        f"model type {kind}: its {type(found).__name__} has no list of decoder blocks named layers (it has "
        f"{', '.join(lists) or 'no list of modules at all'}); only models that name it so, as Llama, Qwen, Mistral, "
        "Gemma and most newer "
        "ones do, can be bent"
    )


WITHOUT_HEAD = (
    "let nothing read logits: objective.kl=0 and no objective.refusal (npo always reads them), no evaluation.sources, "
    "and "
    "validation.every=0 or validation.sources without retain records"
)


def find_head(model: CausalLM) -> Head:
    """The output head as a matrix.

    Raises:
        UserError: the head is not one plain linear layer (adapted, quantised or computed otherwise), so that the
            shared-head KL would be wrong.
    """
    causal = causal_model(model)
    linear = causal.get_output_embeddings()
    if type(linear) is not nn.Linear and not getattr(linear, "lives_on_host", False):
        raise UserError(
            f"the output head is a {type(linear).__name__}, not a plain linear layer; take lm_head out of "
            "lora.target_modules or "
            f"{WITHOUT_HEAD}"
        )
    if linear.weight.requires_grad:
        raise UserError(
            f"the output head is trainable; the shared-head KL needs it frozen: freeze it or {WITHOUT_HEAD}"
        )
    text = causal.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return Head(linear.weight, linear.bias, softcap)


def run_decoder(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    stop: int,
    visit: Visit,
    checkpoint_blocks: int = 0,
    offload: OffloadedInputs | None = None,
) -> None:
    """Run the decoder up to hidden state ``stop`` and visit each hidden state 0 … ``stop``.

    Args:
        input_ids: int64 [B, T]. Padding, if any, is on the right: under causal attention it changes no real row, so no
            mask is passed.
        position_ids: int64 [B, T], for packed sequences (positions restart at 0); None counts from 0.
        stop: last hidden state needed, 1 … number of blocks. Blocks and norm beyond it do not run.
        visit: sees hidden state l, [B, T, D], and returns what the pass goes on with.
        checkpoint_blocks: this many first blocks are recomputed in backward.
        offload: keeps the inputs of those blocks meanwhile; None = they stay where they are.
    """
    total = decoder.num_blocks
    if not 1 <= stop <= total:
        raise ValueError(f"stop must be in 1 … {total}, got {stop}")
    with (
        truncated(decoder.body, decoder.norm_name, stop, visit, checkpoint_blocks, offload),
        known_packing(position_ids is not None),
    ):
        # Layers without attention take no positions.
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = decoder.body(input_ids=input_ids, attention_mask=None, use_cache=False, **positions)
        if stop == total:
            visit(total, output.last_hidden_state)
