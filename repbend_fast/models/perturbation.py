"""Perturbations of hidden states: tensors that a pass adds at chosen rows, found by projected gradient steps.

The inner loop of latent adversarial training (arXiv 2407.15549), and the latent attack of the evaluation. A
perturbation is a ``Visit``, so it goes into ``run_decoder`` as it is, and with ``visiting`` into a model's own forward.

Shapes: B sequences of T positions, D hidden width, M perturbed rows. Hidden states are counted as in ``decoder``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.truncated import Visit, truncated

Ball = Literal["l2", "linf"]
BALLS: tuple[Ball, ...] = ("l2", "linf")


class Perturbation:
    """One row δ of each chosen hidden state for each of M perturbed tokens; all rows begin at 0.

    Args:
        radii: hidden state → the largest size of a row there.
        rows: int64 [N], positions in the flattened [B·T] of a pass at which a row is added.
        width: D.
        of: int64 [N], which of the M rows is added at each position, where sequences share them (two answers to one
            prompt); None = one row each.
        ball: how a row is measured: its length (``l2``), or its largest coordinate (``linf``).
        dtype: of the rows; float32 however coarse the model is, since steps are smaller than a bfloat16 state's grain.
    """

    def __init__(
        self,
        radii: Mapping[int, float],
        rows: Tensor,
        width: int,
        *,
        of: Tensor | None = None,
        ball: Ball = "l2",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.radii = dict(radii)
        self.rows = rows
        self.ball = ball
        self._of = of
        count = len(rows) if of is None else int(of.max()) + 1
        self.deltas = {
            state: torch.zeros(count, width, dtype=dtype, device=rows.device, requires_grad=True)
            for state in sorted(self.radii)
        }

    @classmethod
    def fixed(cls, deltas: Mapping[int, Tensor], rows: Tensor, of: Tensor) -> Perturbation:
        """One that was found: ``deltas`` [M, D] by hidden state, and where they go in another pass."""
        found = cls.__new__(cls)
        found.deltas, found.rows, found._of = dict(deltas), rows, of
        return found

    def visit(self, then: Visit | None = None) -> Visit:
        """Adds the rows, then hands the state on to ``then``. A gradient flows to ``deltas`` and to the state."""

        def visited(state: int, hidden: Tensor) -> Tensor:
            if state in self.deltas:
                hidden = self._added(hidden, self.deltas[state])
            return hidden if then is None else then(state, hidden)

        return visited

    def visit_once(self) -> Visit:
        """Adds the rows in the first pass only: generation reads them from its cache afterwards."""
        seen: set[int] = set()

        def visited(state: int, hidden: Tensor) -> Tensor:
            if state in seen or state not in self.deltas:
                return hidden
            seen.add(state)
            return self._added(hidden, self.deltas[state].detach())

        return visited

    def first(self, count: int) -> Perturbation:
        """The same rows for a pass of one sequence that begins with the ``count`` perturbed tokens alone."""
        alone = copy.copy(self)
        alone.rows, alone._of = self.rows[:count], None if self._of is None else self._of[:count]
        return alone

    def _added(self, hidden: Tensor, delta: Tensor) -> Tensor:
        rows = self.rows.to(hidden.device)
        values = (delta if self._of is None else delta[self._of]).to(hidden)
        return hidden.reshape(-1, hidden.shape[-1]).index_add(0, rows, values).view_as(hidden)

    @torch.no_grad()
    def project(self) -> None:
        """Bring every row back into its ball: shortened to the radius, or each coordinate clamped to it."""
        for state, delta in self.deltas.items():
            radius = self.radii[state]
            if self.ball == "linf":
                delta.clamp_(-radius, radius)
            else:
                delta.div_((torch.linalg.vector_norm(delta, dim=-1, keepdim=True) / radius).clamp(min=1))


def find_perturbation(
    loss: Callable[[Visit], Tensor] | Sequence[Callable[[Visit], Tensor]],
    perturbation: Perturbation,
    *,
    steps: int,
    step_size: float | Mapping[int, float],
) -> Tensor:
    """Projected gradient steps that lower ``loss``; the perturbation holds the last one's rows. Returns the loss before
    each step, [steps]. ``step_size`` is that of a coordinate, or of each hidden state's.

    ``loss`` runs a pass with the visit that it is given and returns a scalar with a graph; of several the sum is
    lowered, with the graph of one at a time. Only the perturbation gets a
    gradient: nothing is added to that of the model's parameters. Steps are those of the source, AdamW's, in ``l2``; of
    a signed gradient in ``linf``. What is not finite in a gradient counts as 0.
    """
    deltas = list(perturbation.deltas.values())
    sizes = [step_size[state] if isinstance(step_size, Mapping) else step_size for state in perturbation.deltas]
    groups = [{"params": [delta], "lr": size} for delta, size in zip(deltas, sizes)]
    optimizer = torch.optim.AdamW(groups) if perturbation.ball == "l2" else None
    losses = []
    visit = perturbation.visit()
    passes = loss if isinstance(loss, Sequence) else (loss,)
    for _ in range(steps):
        values = []
        for one in passes:
            with torch.enable_grad():
                value = one(visit)
                found = torch.autograd.grad(value, deltas)
            values.append(value.detach())
            del value
            for delta, gradient in zip(deltas, found):
                finite = torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)
                delta.grad = finite if delta.grad is None else delta.grad.add_(finite)
            del found
        losses.append(torch.stack(values).sum())
        if optimizer is not None:
            optimizer.step()
        else:
            with torch.no_grad():
                for delta, size in zip(deltas, sizes):
                    assert delta.grad is not None
                    delta.sub_(delta.grad.sign(), alpha=size)
        perturbation.project()
        for delta in deltas:
            delta.grad = None
    return torch.stack(losses) if losses else torch.zeros(0)


@contextmanager
def visiting(model: CausalLM, visit: Visit, *, recompute: bool = False) -> Iterator[None]:
    """While entered, every pass of ``model`` visits its hidden states 0 … number of blocks − 1, ``generate`` included.

    ``recompute``: each block is run again in backward instead of keeping what is inside of it; without a cache.
    """
    decoder = find_decoder(model)
    total = decoder.num_blocks
    with truncated(decoder, total, visit, total if recompute else 0, None):
        yield
