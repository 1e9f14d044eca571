"""Host memory in place of device memory: inputs of recomputed blocks, and the embedding and head of very
small cards.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.packing import host_copy


@dataclass
class _Kept:
    """One state on the host. ``sent`` is the copy that is on its way back, with the event of its arrival."""

    host: Tensor
    requires_grad: bool
    sent: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostStates:
    """Inputs of the recomputed blocks of one pass, in pinned host memory between forward and backward.

    Copies run on a side stream beside the blocks' own work: two may be under way in forward, and backward, which goes
    through the blocks in reverse, fetches one block ahead. On the device at most two states are kept instead of one for
    each block; the cost is the link's time where it is longer than a block's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = device.type == "cuda" and torch.cuda.is_available()
        self._kept: dict[int, _Kept] = {}
        # A state stays referenced until the device has been told to wait for its copy. ``record_stream`` would hold it
        # until the host sees the copy done, and the host runs blocks ahead.
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __del__(self) -> None:
        # After an error copies may still be on their way out of or into memory that is given back now.
        while self._under_way:
            self._let_go()
        for kept in self._kept.values():
            if kept.sent is not None and kept.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(kept.arrived)

    def put(self, index: int, hidden: Tensor) -> None:
        """Copy the input of block ``index``; the caller may drop it at once."""
        kept = _Kept(torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._streams), hidden.requires_grad)
        self._kept[index] = kept
        hidden = hidden.detach()
        if not self._streams:
            kept.host.copy_(hidden)
            return
        stream, current = _side_stream(self.device), torch.cuda.current_stream(self.device)
        if len(self._under_way) == 2:
            # Without this the device would hold every state that the link has not taken yet.
            self._let_go()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            kept.host.copy_(hidden, non_blocking=True)
        self._under_way.append((hidden, stream.record_event()))

    def _let_go(self) -> None:
        _, event = self._under_way.popleft()
        torch.cuda.current_stream(self.device).wait_event(event)

    def get(self, index: int) -> Tensor:
        """The input of block ``index`` on the device, a leaf; the one of the block before is sent for as well."""
        while self._under_way:
            self._let_go()
        kept = self._kept[index]
        self._send(kept)
        if index - 1 in self._kept:
            self._send(self._kept[index - 1])
        hidden, kept.sent = kept.sent, None
        assert hidden is not None
        if kept.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
        return hidden.requires_grad_(kept.requires_grad)

    def _send(self, kept: _Kept) -> None:
        if kept.sent is not None:
            return
        kept.sent = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self.device)
        if not self._streams:
            kept.sent.copy_(kept.host)
            return
        stream = _side_stream(self.device)
        # The new tensor's memory may still be in use by work that was queued before.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            kept.sent.copy_(kept.host, non_blocking=True)
        kept.arrived = stream.record_event()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def host_states(wanted: bool, device: torch.device) -> HostStates | None:
    """A store for one pass where offloading makes sense: on the CPU, states are in host memory as they are."""
    return HostStates(device) if wanted and device.type == "cuda" else None


class HostEmbedding(nn.Module):
    """What an embedding in host memory gets in front of its own class: rows are looked up there and sent over.

    A step's pieces know their ids on the host. Others', as in generation, come back from the device for that, which
    waits for the work queued before.
    """

    compute_device: torch.device

    def forward(self, input_ids: Tensor) -> Tensor:
        """[..., D] on the compute device from ids on any device."""
        return super().forward(host_copy(input_ids)).to(self.compute_device, non_blocking=True)


class HostLinear(nn.Linear):
    """An output head in host memory, whose weight visits the device for one call: in generation, once per token."""

    lives_on_host = True

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., V] on the input's device."""
        bias = None if self.bias is None else self.bias.to(input.device)
        return nn.functional.linear(input, self.weight.to(input.device, non_blocking=True), bias)


def offload_embedding(model: CausalLM, changes: Changes | None = None) -> None:
    """Move the input embedding and the output head, tied or not, to pinned host memory, in place. A second call changes
    nothing.

    Saves their size on the device (2 · V · D, half of it where they are tied). It costs per piece of a stream with a
    head term the transfer of the whole head: 1 GB for Llama-3-8B, about 0.1 s; in generation, a wait for the device per
    pass, for the token ids. While such a piece's head loss runs, the head is on the device; it has left before
    backward. Parameters stay the same objects; undone, their values are on the device again.

    Raises:
        UserError: the head is not a plain frozen linear layer.
    """
    causal, device = causal_model(model), find_decoder(model).device
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        return
    if type(head) is not nn.Linear or head.weight.requires_grad:
        raise UserError(
            f"memory.offload_embedding=true: the output head is a {type(head).__name__}, and only a frozen plain "
            "linear layer can "
            "be kept in host memory; set it to false"
        )
    changes = changes or Changes()
    # Tied ends share one parameter.
    for parameter in {p: None for module in (embedding, head) for p in module.parameters(recurse=False)}:
        changes.place(parameter, _to_host(parameter.detach()))
    for module in (embedding, head):
        for name, buffer in list(module.named_buffers(recurse=False)):
            changes.entry(module._buffers, name, buffer.to("cpu"))
    changes.kind(embedding, _with_host_lookup(cast(type, embedding.__class__)))
    changes.entry(vars(embedding), "compute_device", device)
    changes.kind(head, HostLinear)


def _to_host(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if tensor.is_cuda and torch.cuda.is_available() else host


@cache
def _with_host_lookup(base: type) -> type:
    return type(f"Host{base.__name__}", (HostEmbedding, base), {})
