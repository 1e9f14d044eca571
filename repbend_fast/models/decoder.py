"""The parts of a causal LM that a truncated, tapped pass needs, and that pass itself.

One mechanism for every family: for one pass the list of blocks is a shortened one of thin wrappers (block, checkpoint,
tap) that delegate attributes (``layers.truncated``); it is restored afterwards. Hidden-state indices are Hugging
Face's: 0 is the embedding output, *l* the output of block *l − 1*, the last one the output after the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM, Shape
from repbend_fast.models.layers.packing import Packed, known_mask
from repbend_fast.models.layers.truncated import OffloadedInputs, Visit, truncated
from repbend_fast.models.layers.varlen import knows_packing

NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm", "final_norm", "norm_f")
"""What families call their final norm. A truncated pass leaves it out; under another name it runs, and its
result is not used.
"""


@dataclass(frozen=True)
class Decoder:
    """``body`` embeds, runs ``layers`` and applies its final norm (attribute ``norm_name``, None where it has an
    unknown name).

    ``list_name``: where in ``body`` the list of blocks is, dotted where a part holds it (``encoder.layer``).
    """

    body: nn.Module
    norm_name: str | None
    list_name: str = "layers"

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.get_submodule(self.list_name)  # type: ignore[return-value]

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that holds the list of blocks, and the list's name in it."""
        path, _, name = self.list_name.rpartition(".")
        return self.body.get_submodule(path), name

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where the blocks compute; the embedding may live elsewhere."""
        return next(self.layers.parameters()).device


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap · tanh((W h' + b) / softcap), or W h' + b without a soft-cap, where h' =
    ``inputs(h)``: h, or scale · h. ``weight`` is [V, D].
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float | None = None

    def inputs(self, states: Tensor) -> Tensor:
        """What the weight is multiplied with, of hidden states [..., D]."""
        return states if self.scale is None else states * self.scale

    def on(self, device: torch.device) -> Head:
        """The head on a device. Where its weight lives in host memory this is a copy, which is freed with the returned
        head.
        """
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True)
        return replace(self, weight=self.weight.to(device, non_blocking=True), bias=bias)


def causal_model(model: CausalLM) -> CausalLM:
    """The transformers model inside an optional PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_decoder(model: CausalLM) -> Decoder:
    """Locate the decoder of any transformers causal LM: a list named ``layers``, or else the one list of as many equal
    parts as the configuration counts blocks (GPT-2's ``h``, MPT's ``blocks``).

    Raises:
        UserError: the architecture keeps its decoder blocks in no such list.
    """
    causal = causal_model(model)
    found = causal.get_decoder()
    # Some families' get_decoder() gives back the causal LM itself.
    bodies = [
        body
        for body in (found, getattr(found, "model", None), getattr(causal, "model", None))
        if isinstance(body, nn.Module)
    ]
    for body in bodies:
        if isinstance(getattr(body, "layers", None), nn.ModuleList):
            return Decoder(body, _norm_of(body))
    inner = getattr(causal, getattr(causal, "base_model_prefix", "") or "model", None)
    body = inner if found is causal and isinstance(inner, nn.Module) else found
    lists = {name: part for name, part in body.named_modules() if isinstance(part, nn.ModuleList)}
    depth = getattr(causal.config.get_text_config(), "num_hidden_layers", None)
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [name for name in outer if len(lists[name]) == depth]
    if len(blocks) == 1:
        return Decoder(body, _norm_of(body), blocks[0])
    kind = getattr(causal.config, "model_type", type(causal).__name__)
    held = ", ".join(f"{name} ({len(lists[name])})" for name in outer)
    raise UserError(
        f"model type {kind}: its {type(body).__name__} has no one list of {depth or 'its'} decoder blocks "
        f"(it has {held or 'no list of modules at all'}), so that no pass can stop between two of them"
    )


def _norm_of(body: nn.Module) -> str | None:
    return next((name for name in NORM_NAMES if isinstance(getattr(body, name, None), nn.Module)), None)


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
    softcap = next((cap for name in SOFTCAP_NAMES if (cap := getattr(text, name, None))), None)
    return Head(linear.weight, linear.bias, softcap, _head_scale(text))


SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call the soft-cap of their logits."""


def _head_scale(text: Shape) -> float | None:
    """What a family multiplies its logits by, under the names that are known; the proof at load shows whether it
    does.
    """
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    for name in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite and MiniCPM3, Inkling
        scale /= getattr(text, name, None) or 1.0
    return None if scale == 1.0 else scale


def run_decoder(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    packed: Packed | None = None,
    stop: int,
    visit: Visit,
    checkpoint_blocks: int = 0,
    offload: OffloadedInputs | None = None,
) -> None:
    """Run the decoder up to hidden state ``stop`` and visit each hidden state 0 … ``stop``.

    Args:
        input_ids: int64 [B, T]. Padding, if any, is on the right: under causal attention it changes no real row, so no
            mask hides it.
        packed: the sequences that share the row, T of them in all; None = each row is one sequence.
        stop: last hidden state needed, 1 … number of blocks. Blocks and norm beyond it do not run.
        visit: sees hidden state l, [B, T, D], and returns what the pass goes on with.
        checkpoint_blocks: this many first blocks are recomputed in backward.
        offload: keeps the inputs of those blocks meanwhile; None = they stay where they are.
    """
    total = decoder.num_blocks
    if not 1 <= stop <= total:
        raise ValueError(f"stop must be in 1 … {total}, got {stop}")
    body = decoder.body
    knows = knows_packing(body)
    mask = known_mask(input_ids, packed, decoder.device) if knows else None
    # Layers without attention take no positions.
    rows: dict[str, object] = {} if packed is None else {"position_ids": packed.position_ids}
    if packed is not None and knows:
        rows["packed"] = packed
    with truncated(decoder, stop, visit, checkpoint_blocks, offload):
        output = body(input_ids=input_ids, attention_mask=mask, use_cache=False, **rows)
        if stop == total:
            visit(total, output.last_hidden_state)
