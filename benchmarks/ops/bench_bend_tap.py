"""``bend_tap``: forward and backward of one tap, each direction alone and together, against the published
expression.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from repbend_kernels import bend_tap
from repbend_kernels.oracles import bend_tap_reference
from torch import Tensor

from benchmarks.baselines.distances import published_row_distance
from benchmarks.harness import Call, Measure, Result, Work

Size = tuple[int, int, int]
Tap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# Rows of the stream, how many of them are selected, width.
SIZES = {
    "smoke": [(64, 32, 32)],
    "cpu": [(4096, 2048, 576)],
    "cuda": [(16384, 16384, 4096)],
    "sweep": [
        (rows, rows // share, width)
        for width in (2048, 4096, 5120)
        for rows, share in ((1024, 1), (4096, 1), (16384, 2))
    ],
}


def input_sets(device: torch.device, smoke: bool) -> int:
    """How many sets of inputs take turns, so that none is found in a cache."""
    return 1 if smoke else 4 if device.type == "cuda" else 2


def inputs(
    device: torch.device, dtype: torch.dtype, count: int, selected: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    hidden = torch.randn(1, count, width, generator=generator, device=device, dtype=dtype)
    rows = torch.arange(0, count, count // selected, device=device)
    reference = hidden[0, rows] + 0.1 * torch.randn(selected, width, generator=generator, device=device, dtype=dtype)
    incoming = torch.randn(1, count, width, generator=generator, device=device, dtype=dtype) / selected
    return hidden, reference, rows, incoming


def tap_call(hidden: Tensor, reference: Tensor, rows: Tensor, incoming: Tensor, run: Tap) -> Call:
    """Forward and backward through the stream. The first call's result is checked; later ones find directions in our
    buffer, which is the same work on other numbers, so they are taken as refilled.
    """
    leaf, buffer, weight = (
        hidden.detach().requires_grad_(),
        reference.clone(),
        torch.tensor(0.5 / rows.numel(), device=hidden.device),
    )

    def call() -> Result:
        torch.autograd.graph.increment_version(buffer)
        stream, loss = run(leaf, buffer, rows)
        (grad,) = torch.autograd.grad([stream, loss], [leaf], [incoming, weight])
        return loss.detach(), [grad]

    return call


CONTENDERS: dict[str, Tap] = {
    "ours": lambda h, r, rows: bend_tap(h, r, rows),
    "eager": lambda h, r, rows: (h, published_row_distance(h, r, rows)),
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_bend_tap(
    measured: Measure, device: torch.device, dtype: torch.dtype, smoke: bool, size: Size, contender: str
) -> None:
    count, selected, width = size
    data = [inputs(device, dtype, count, selected, width, seed) for seed in range(input_sets(device, smoke))]
    hidden, reference, rows, incoming = data[0]
    exact = tap_call(hidden.double(), reference.double(), rows, incoming.double(), bend_tap_reference)()
    calls = [tap_call(*d, CONTENDERS[contender]) for d in data]
    element = hidden.element_size()
    # Forward reads h and r and writes the direction at the rows; backward reads and writes the stream and reads the
    # directions.
    moved = element * width * (3 * selected + 2 * count + selected)
    work = Work(
        "bend_tap", f"{count}x{width} {selected} rows", contender, calls, exact, tolerance=3e-2, bytes_moved=moved
    )
    measured(work)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bend_tap_direction(
    measured: Measure, device: torch.device, dtype: torch.dtype, smoke: bool, size: Size, direction: str
) -> None:
    count, selected, width = size
    data = [inputs(device, dtype, count, selected, width, seed) for seed in range(input_sets(device, smoke))]
    calls: list[Call] = []
    exact: Result | None = None
    for hidden, reference, rows, incoming in data:
        leaf, weight = hidden.detach().requires_grad_(), torch.tensor(0.5 / selected, device=device)
        stream, loss = bend_tap(leaf, reference.clone(), rows)
        if direction == "forward":
            buffer = torch.zeros_like(reference)

            def forward(leaf: Tensor = leaf, buffer: Tensor = buffer, rows: Tensor = rows) -> Result:
                torch.autograd.graph.increment_version(buffer)
                return bend_tap(leaf, buffer, rows)[1].detach(), []

            calls.append(forward)
            exact = exact or (bend_tap_reference(hidden.double(), torch.zeros_like(reference).double(), rows)[1], [])
        else:

            def backward(
                stream: Tensor = stream,
                loss: Tensor = loss,
                leaf: Tensor = leaf,
                incoming: Tensor = incoming,
                weight: Tensor = weight,
            ) -> Result:
                grads = torch.autograd.grad([stream, loss], [leaf], [incoming, weight], retain_graph=True)
                return loss.detach(), list(grads)

            calls.append(backward)
            exact = (
                exact or tap_call(hidden.double(), reference.double(), rows, incoming.double(), bend_tap_reference)()
            )
    element = data[0][0].element_size()
    moved = element * width * (3 * selected if direction == "forward" else 2 * count + selected)
    assert exact is not None
    work = Work(
        "bend_tap", f"{count}x{width} {selected} rows, {direction}", "ours", calls, exact, 3e-2, bytes_moved=moved
    )
    measured(work)
