"""What a stream's run reports, accumulated piece by piece on the device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repbend_fast.distributed.ranks import Ranks


@dataclass
class StreamResult:
    """Loss terms of one stream as device scalars (fp32): nothing here synchronises with the host.

    ``terms[name]`` is the unweighted term (S, U, C, K, P); ``layers[name][l]`` the mean distance over the term's rows
    at hidden state l; ``loss`` the weighted sum.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    tokens: int = 0

    def weigh(self, weights: dict[str, float]) -> None:
        """Make ``loss`` the sum of the terms with these weights."""
        loss = torch.zeros((), device=self.loss.device)
        for name, weight in weights.items():
            loss = loss + weight * self.terms[name]
        self.loss = loss


class Meter:
    """Accumulates the terms of one stream. A piece fills a meter of its own, which is merged when the piece is done.

    Attributes:
        values: by name of the value.
        layers: sums over rows by name and hidden state.
        tokens: of the pieces so far.
    """

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens
        self.values: dict[str, Tensor] = {}
        self.layers: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a value of the whole stream."""
        self.values[name] = self.values[name] + value if name in self.values else value

    def add_layer(self, name: str, layer: int, value: Tensor) -> None:
        """Add the sum over rows of a value at a hidden state."""
        layers = self.layers[name]
        layers[layer] = layers[layer] + value.detach() if layer in layers else value.detach()

    def merge(self, piece: Meter) -> None:
        """Add what a finished piece measured."""
        for name, value in piece.values.items():
            self.add(name, value)
        for name, layers in piece.layers.items():
            for layer, value in layers.items():
                self.add_layer(name, layer, value)
        self.tokens += piece.tokens

    def total(self, ranks: Ranks) -> None:
        """Take in what the other processes measured of the same stream."""
        names, layers = (
            sorted(self.values),
            [(name, layer) for name in sorted(self.layers) for layer in self.layers[name]],
        )
        found = iter(ranks.totals([*(self.values[n] for n in names), *(self.layers[n][layer] for n, layer in layers)]))
        self.values = {name: next(found) for name in names}
        for name, layer in layers:
            self.layers[name][layer] = next(found)
