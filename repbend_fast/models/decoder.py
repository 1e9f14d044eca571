"""The parts of a causal LM that a truncated, tapped pass needs, and that pass itself.

One mechanism for every family: for one pass ``decoder.layers`` is a shortened list of thin wrappers (block, checkpoint, tap)
that delegate attributes; it is restored afterwards. Hidden-state indices are Hugging Face's: 0 is the embedding output,
*l* the output of block *l − 1*, the last one the output after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from repbend_fast.errors import UserError
from repbend_fast.models.layers.packing import known_packing
from repbend_fast.ranges import CHECKPOINTED

NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm", "final_norm", "norm_f")
"""What families call their final norm. A truncated pass leaves it out; under another name it runs, and its result is not used."""

Visit = Callable[[int, Tensor], Tensor]
"""``visit(l, hidden[B, T, D]) -> hidden``: called once, in order, for each hidden state l ≥ 0 that the pass reaches."""


@dataclass(frozen=True)
class Decoder:
    """``body`` embeds, runs ``layers`` and applies its final norm (attribute ``norm_name``, None where it has an unknown name)."""

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
    """The output head: logits = softcap · tanh((W h + b) / softcap), or W h + b without a soft-cap. ``weight`` is [V, D]."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def on(self, device: torch.device) -> Head:
        """The head on a device. Where its weight lives in host memory this is a copy, which is freed with the returned head."""
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True)
        return Head(self.weight.to(device, non_blocking=True), bias, self.softcap)


def causal_model(model: Any) -> Any:
    """The transformers model inside an optional PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_decoder(model: nn.Module) -> Decoder:
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
    lists = [f"{name} ({len(part)})" for name, part in found.named_modules() if isinstance(part, nn.ModuleList) and "." not in name]
    raise UserError(
        f"model type {kind}: its {type(found).__name__} has no list of decoder blocks named layers (it has "
        f"{', '.join(lists) or 'no list of modules at all'}); only models that name it so, as Llama, Qwen, Mistral, Gemma and most newer "
        "ones do, can be bent"
    )


WITHOUT_HEAD = (
    "let nothing read logits: objective.kl=0 and no objective.refusal (npo always reads them), no evaluation.sources, and "
    "validation.every=0 or validation.sources without retain records"
)


def find_head(model: nn.Module) -> Head:
    """The output head as a matrix.

    Raises:
        UserError: the head is not one plain linear layer (adapted, quantised or computed otherwise), so that the shared-head
            KL would be wrong.
    """
    causal = causal_model(model)
    linear = causal.get_output_embeddings()
    if type(linear) is not nn.Linear and not getattr(linear, "lives_on_host", False):
        raise UserError(
            f"the output head is a {type(linear).__name__}, not a plain linear layer; take lm_head out of lora.target_modules or "
            f"{WITHOUT_HEAD}"
        )
    if linear.weight.requires_grad:
        raise UserError(f"the output head is trainable; the shared-head KL needs it frozen: freeze it or {WITHOUT_HEAD}")
    text = causal.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return Head(linear.weight, linear.bias, softcap)


class _Block(nn.Module):
    """One decoder block for one pass: block, optionally recomputed in backward, then the visit outside of the recomputed region."""

    def __init__(self, block: nn.Module, index: int, visit: Visit, *, last: bool, recompute: bool, offload: OffloadedInputs | None) -> None:
        super().__init__()
        self.block = block
        self._index = index
        self._visit = visit
        # The output of the last block is no hidden state: the last hidden state is read after the norm.
        self._last = last
        self._recompute = recompute
        self._offload = offload

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._index == 0:
            hidden = self._visit(0, hidden)
        if self._recompute and torch.is_grad_enabled():
            source = _Input(self._index, hidden, self._offload)
            del hidden
            # No generator's state decides anything in a block: LoRA's dropout follows keys, a model's own is off.
            output = checkpoint(self._run, source, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            output = self.block(hidden, *args, **kwargs)
        if self._last:
            return output
        if isinstance(output, tuple):
            return (self._visit(self._index + 1, output[0]), *output[1:])
        return self._visit(self._index + 1, output)

    def _run(self, source: _Input, *args: Any, **kwargs: Any) -> Any:
        with record_function(CHECKPOINTED):
            return self.block(source.take(), *args, **kwargs)


class OffloadedInputs(Protocol):
    """Where inputs of recomputed blocks wait: ``layers.offload.HostStates``."""

    def put(self, index: int, hidden: Tensor) -> None:
        """Take a copy of the input of block ``index``."""

    def get(self, index: int) -> Tensor:
        """The input of block ``index``, a leaf on the device."""


class _Input:
    """The input of a recomputed block: kept, or with ``offload`` given up at the first run and fetched for the second.

    Checkpointing keeps its arguments alive, so the tensor itself must not be one.
    """

    def __init__(self, index: int, hidden: Tensor, offload: OffloadedInputs | None) -> None:
        self._index, self._offload = index, offload
        self._hidden: Tensor | None = hidden

    def take(self) -> Tensor:
        """The input, for forward and for the recomputation."""
        if self._hidden is None:
            assert self._offload is not None
            return self._offload.get(self._index)
        hidden = self._hidden
        if self._offload is not None:
            self._offload.put(self._index, hidden)
            self._hidden = None
        return hidden


class _LeftOutNorm(nn.Module):
    """The final norm of a truncated pass: itself until the blocks have run, since a family may use it before them too, then nothing."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.left_out = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden if self.left_out else self.norm(hidden, *args, **kwargs)


@contextmanager
def _shortened(decoder: Decoder, stop: int, visit: Visit, checkpoint_blocks: int, offload: OffloadedInputs | None) -> Iterator[None]:
    body, layers, name = decoder.body, decoder.layers, decoder.norm_name
    total = len(layers)
    norm = None if name is None or stop == total else _LeftOutNorm(getattr(body, name))
    if norm is not None:
        visit = _then_leave_out(norm, stop, visit)
    wrapped = [
        _Block(layers[i], i, visit, last=i + 1 == total, recompute=i < checkpoint_blocks, offload=offload) for i in range(min(stop, total))
    ]
    try:
        body.layers = nn.ModuleList(wrapped)
        if name is not None and norm is not None:
            setattr(body, name, norm)
        yield
    finally:
        body.layers = layers
        if name is not None and norm is not None:
            setattr(body, name, norm.norm)


def _then_leave_out(norm: _LeftOutNorm, stop: int, visit: Visit) -> Visit:
    """``visit``, and at hidden state ``stop``, behind the last block that runs, the norm is switched off."""

    def visited(layer: int, hidden: Tensor) -> Tensor:
        norm.left_out = layer == stop
        return visit(layer, hidden)

    return visited


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
        input_ids: int64 [B, T]. Padding, if any, is on the right: under causal attention it changes no real row, so no mask is passed.
        position_ids: int64 [B, T], for packed sequences (positions restart at 0); None counts from 0.
        stop: last hidden state needed, 1 … number of blocks. Blocks and norm beyond it do not run.
        visit: sees hidden state l, [B, T, D], and returns what the pass goes on with.
        checkpoint_blocks: this many first blocks are recomputed in backward.
        offload: keeps the inputs of those blocks meanwhile; None = they stay where they are.
    """
    total = decoder.num_blocks
    if not 1 <= stop <= total:
        raise ValueError(f"stop must be in 1 … {total}, got {stop}")
    with _shortened(decoder, stop, visit, checkpoint_blocks, offload), known_packing(position_ids is not None):
        # Layers without attention take no positions.
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = decoder.body(input_ids=input_ids, attention_mask=None, use_cache=False, **positions)
        if stop == total:
            visit(total, output.last_hidden_state)
