"""What a stream's run reports, accumulated piece by piece on the device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repbend_fast.objectives.base import Stream


@dataclass
class StreamResult:
    """Loss terms of one stream as device scalars (fp32): nothing here synchronises with the host.

    ``terms[name]`` is the unweighted term (S, U, C, K, P); ``layers[name][l]`` the mean distance over the term's rows at
    hidden state l; ``loss`` the weighted sum.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    tokens: int = 0


class Meter:
    """Accumulates the terms of one stream. A piece fills a meter of its own, which is merged when the piece is done."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream = stream
        self.device = device
        self.tokens = 0
        self._values: dict[str, Tensor] = {}
        self._layers: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a term that is no distance."""
        self._values[name] = self._values[name] + value if name in self._values else value

    def add_distance(self, term: int, layer: int, distance: Tensor) -> None:
        """Add the sum over rows of distance number ``term`` at a hidden state."""
        layers = self._layers[term]
        layers[layer] = layers[layer] + distance.detach() if layer in layers else distance.detach()

    def merge(self, piece: Meter) -> None:
        """Add what a finished piece measured."""
        for name, value in piece._values.items():
            self.add(name, value)
        for term, layers in piece._layers.items():
            for layer, distance in layers.items():
                self.add_distance(term, layer, distance)
        self.tokens += piece.tokens

    def result(self) -> StreamResult:
        """The stream's terms, layers and loss."""
        loss = torch.zeros((), device=self.device)
        result = StreamResult(loss, dict(self._values), tokens=self.tokens)
        for i, term in enumerate(self.stream.distances):
            rows = term.rows or max(1, sum(stop - start for start, stop in term.spans))
            total = torch.stack(list(self._layers[i].values())).sum()
            result.terms[term.name] = total / term.denominator
            result.layers[term.name] = {layer: value / rows for layer, value in self._layers[i].items()}
        for name, weight in self.stream.weights.items():
            loss = loss + weight * result.terms[name]
        result.loss = loss
        return result
