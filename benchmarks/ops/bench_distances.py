"""``bend_distance``, ``window_distance`` and ``pairwise_cosine`` against the published expressions and plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from repbend_kernels import bend_distance, pairwise_cosine, window_distance
from repbend_kernels.oracles import bend_distance_reference, pairwise_cosine_reference, window_distance_reference
from torch import Tensor

from benchmarks.baselines.distances import (
    looped_window_distance,
    published_pairwise_cosine,
    published_row_distance,
    published_window_distance,
)
from benchmarks.harness import Call, Measure, Result, Work

SIZES = {
    "test_bend_distance": {  # rows of the stream, width
        "smoke": [(64, 32)],
        "cpu": [(4096, 576)],
        "cuda": [(16384, 4096)],
        "sweep": [(16384, 2048), (4096, 4096), (16384, 5120)],
    },
    "test_window_distance": {  # layers, rows, width
        "smoke": [(3, 64, 32)],
        "cpu": [(33, 2048, 576)],
        "cuda": [(11, 4096, 4096)],
        "sweep": [(11, 4096, 2048), (33, 1024, 4096), (11, 4096, 5120)],
    },
    "test_pairwise_cosine": {  # layers, sequences, width
        "smoke": [(2, 4, 32)],
        "cpu": [(11, 32, 576)],
        "cuda": [(11, 64, 4096)],
        "sweep": [(11, 4, 4096), (11, 64, 2048), (11, 64, 5120)],
    },
}


def loss_call(leaves: Sequence[Tensor], run: Callable[..., Tensor]) -> Call:
    """Forward and backward of a scalar loss."""

    def call() -> Result:
        loss = run(*leaves)
        return loss.detach(), list(torch.autograd.grad(loss, leaves))

    return call


def normal(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device=device).manual_seed(seed), device=device, dtype=dtype)


ROW_CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": lambda h, r, rows: bend_distance(h, r, rows, reduction="sum"),
    "eager": published_row_distance,
}


@pytest.mark.parametrize("contender", ROW_CONTENDERS)
def test_bend_distance(
    measured: Measure, device: torch.device, dtype: torch.dtype, size: tuple[int, int], contender: str
) -> None:
    count, width = size
    rows = torch.arange(0, count, 2, device=device)
    hidden, reference = normal((count, width), device, dtype, 1), normal((rows.numel(), width), device, dtype, 2)
    exact = loss_call(
        [hidden.double().requires_grad_()], lambda h: bend_distance_reference(h, reference.double(), rows, "l2", "sum")
    )()
    call = loss_call([hidden.requires_grad_()], lambda h: ROW_CONTENDERS[contender](h, reference, rows))
    moved = hidden.element_size() * width * (2 * rows.numel() + 2 * rows.numel() + count)
    measured(
        Work("bend_distance", f"{count}x{width} {rows.numel()} rows", contender, [call], exact, 2e-2, bytes_moved=moved)
    )


def consuming_window_distance(hiddens: Sequence[Tensor], references: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The first call's result is checked; later ones take what it left for refilled references, which is
    the same work.
    """
    torch.autograd.graph.increment_version(references)
    return window_distance(hiddens, references, mask, consume_references=True)


WINDOW_CONTENDERS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]] = {
    "ours": lambda hs, rs, mask: window_distance(hs, rs, mask),
    "ours, consume_references": consuming_window_distance,
    "eager": published_window_distance,
    "torch loop": looped_window_distance,
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("contender", WINDOW_CONTENDERS)
def test_window_distance(
    measured: Measure,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    contender: str,
    direction: str,
) -> None:
    layers, count, width = size
    mask = torch.ones(1, count, dtype=torch.bool, device=device)
    mask[:, -count // 8 :] = False
    hiddens = [normal((1, count, width), device, dtype, seed).requires_grad_() for seed in range(layers)]
    references = [normal((1, count, width), device, dtype, 100 + seed) for seed in range(layers)]
    run = WINDOW_CONTENDERS[contender]
    exact: Result
    if direction == "forward":
        exact = (
            window_distance_reference(
                [h.double() for h in hiddens], [r.double() for r in references], mask, "l2"
            ).detach(),
            [],
        )

        def call() -> Result:
            return run(hiddens, references, mask).detach(), []
    else:
        doubles = [h.detach().double().requires_grad_() for h in hiddens]
        exact = loss_call(
            doubles, lambda *hs: window_distance_reference(hs, [r.double() for r in references], mask, "l2")
        )()
        call = loss_call(hiddens, lambda *hs: run(hs, references, mask))
    element = hiddens[0].element_size()
    moved = layers * int(mask.sum()) * width * element * (2 if direction == "forward" else 4)
    case = f"{layers}x{count}x{width} {direction}"
    measured(Work("window_distance", case, contender, [call], exact, 2e-2, bytes_moved=moved))


PAIR_CONTENDERS: dict[str, Callable[[Tensor], Tensor]] = {"ours": pairwise_cosine, "eager": published_pairwise_cosine}


@pytest.mark.parametrize("contender", PAIR_CONTENDERS)
def test_pairwise_cosine(
    measured: Measure, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], contender: str
) -> None:
    states = normal(size, device, dtype, 1)
    exact = loss_call([states.double().requires_grad_()], pairwise_cosine_reference)()
    call = loss_call([states.requires_grad_()], PAIR_CONTENDERS[contender])
    moved = states.numel() * states.element_size() * 5
    measured(Work("pairwise_cosine", "x".join(map(str, size)), contender, [call], exact, 3e-2, bytes_moved=moved))
