"""The memory contract of every op, from the allocator's own record (CPU here; a GPU has the same bounds)."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import spread
from repbend_kernels import (
    bend_distance,
    bend_tap,
    keyed_dropout,
    linear_kl_div,
    linear_log_prob,
    pairwise_cosine,
    tap_rows,
    window_distance,
)

from benchmarks.measure import peak_bytes

WIDTH = 512
FEW, MANY = 2048, 6144
# Three blocks of scratch and their masks; what a call may hold whatever the sizes.
SCRATCH = 5 << 20
ROW_BYTES = 4 * WIDTH


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Filling would not change a peak, only the time."""
    return


def growth(device, make) -> float:
    """Bytes per added row that the peak grows by, from FEW to MANY rows; ``make(rows)`` returns the call to measure."""
    few, many = (peak_bytes(make(rows), device) for rows in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def states(rows, device, seed=1, grad=False):
    return spread((1, rows, WIDTH), torch.float32, device, seed).requires_grad_(grad)


def backward_of(loss):
    return lambda: loss.backward()


def tap(rows, device, kind):
    return bend_tap(
        states(rows, device, grad=True), states(rows, device, 2)[0], torch.arange(rows, device=device), kind=kind
    )


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_bend_tap_forward_holds_scalars_per_row(device, kind) -> None:
    def make(rows):
        hidden, reference, index = (
            states(rows, device, grad=True),
            states(rows, device, 2)[0],
            torch.arange(rows, device=device),
        )
        return lambda: bend_tap(hidden, reference, index, kind=kind)

    assert growth(device, make) <= 32
    assert peak_bytes(make(FEW), device) <= SCRATCH


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_bend_tap_backward_holds_the_gradient(device, kind) -> None:
    def make(rows):
        stream, loss = tap(rows, device, kind)
        return lambda: torch.autograd.backward([stream, loss], [stream.detach(), torch.ones((), device=device)])

    assert growth(device, make) <= ROW_BYTES + 32


def test_tap_rows_holds_the_copy_and_one_gradient(device) -> None:
    def forward(rows):
        hidden, index = states(rows, device, grad=True), torch.arange(0, rows, 4, device=device)
        return lambda: tap_rows(hidden, index)

    def backward(rows):
        stream, copy = tap_rows(states(rows, device, grad=True), torch.arange(0, rows, 4, device=device))
        return lambda: torch.autograd.backward([stream, copy], [stream.detach(), copy.detach()])

    assert growth(device, forward) <= ROW_BYTES / 4 + 32
    assert growth(device, backward) <= ROW_BYTES + 32


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_bend_distance(device, kind) -> None:
    def forward(rows):
        hidden, reference = states(rows, device, grad=True), states(rows, device, 2)
        return lambda: bend_distance(hidden, reference, kind=kind)

    def backward(rows):
        return backward_of(bend_distance(states(rows, device, grad=True), states(rows, device, 2), kind=kind))

    assert growth(device, forward) <= 32
    assert growth(device, backward) <= ROW_BYTES + 32


@pytest.mark.parametrize("consume", [False, True], ids=["keep", "consume"])
def test_window_distance(device, consume) -> None:
    layers = 3

    def layer_states(rows):
        hiddens = [states(rows, device, seed, grad=True) for seed in range(layers)]
        return (
            hiddens,
            [states(rows, device, seed + 9) for seed in range(layers)],
            torch.ones(1, rows, dtype=torch.bool, device=device),
        )

    def forward(rows):
        hiddens, references, mask = layer_states(rows)
        return lambda: window_distance(hiddens, references, mask, consume_references=consume)

    def backward(rows):
        hiddens, references, mask = layer_states(rows)
        return backward_of(window_distance(hiddens, references, mask, consume_references=consume))

    assert growth(device, forward) <= 32 * layers
    assert growth(device, backward) <= (0 if consume else layers * ROW_BYTES) + 32 * layers


def test_pairwise_cosine(device) -> None:
    def forward(rows):
        hidden = states(rows, device, grad=True)
        return lambda: pairwise_cosine(hidden)

    def backward(rows):
        return backward_of(pairwise_cosine(states(rows, device, grad=True)))

    assert growth(device, forward) <= 2 * ROW_BYTES + 32
    assert growth(device, backward) <= 4 * ROW_BYTES + 32


VOCABULARY, CHUNK, HEAD_WIDTH = 20000, 32, 32
BUFFER = 4 * CHUNK * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["linear_kl_div", "linear_log_prob"])
def test_heads_hold_their_chunk_buffers(device, op, dtype) -> None:
    """Two or one (chunk × vocabulary) float32 buffers, the scratch of a few rows, and the gradient of hidden with its
    scaled copy.
    """
    weight = spread((VOCABULARY, HEAD_WIDTH), dtype, device, 3)

    def call(rows):
        hidden = spread((rows, HEAD_WIDTH), dtype, device, 1).requires_grad_()
        if op == "linear_kl_div":
            reference = spread((rows, HEAD_WIDTH), dtype, device, 2)
            return lambda: linear_kl_div(hidden, reference, weight, chunk_rows=CHUNK).backward()
        targets = torch.arange(rows, device=device) % VOCABULARY
        return lambda: linear_log_prob(hidden, weight, targets, chunk_rows=CHUNK).sum().backward()

    call(2 * CHUNK)()  # a GPU's matrix products ask for their workspace once
    buffers = 2 if op == "linear_kl_div" else 1
    cast_tile = 0 if dtype == torch.float32 else 4 * VOCABULARY * (HEAD_WIDTH + CHUNK)
    few, many = (peak_bytes(call(rows), device) for rows in (2 * CHUNK, 10 * CHUNK))
    assert few <= buffers * BUFFER + 2 * SCRATCH + cast_tile
    assert many - few <= 8 * CHUNK * (2 * 4 * HEAD_WIDTH + 64)


@pytest.mark.parametrize("op", ["linear_kl_div", "linear_log_prob"])
def test_heads_copy_no_selection(device, op) -> None:
    """With rows, forward adds their gradient and nothing else that grows with them."""
    weight = spread((50, WIDTH), torch.float32, device, 3)

    def make(rows):
        hidden, index = states(rows, device, grad=True)[0], torch.arange(rows, device=device)
        if op == "linear_kl_div":
            reference = states(rows, device, 2)[0]
            return lambda: linear_kl_div(hidden, reference, weight, rows=index, chunk_rows=CHUNK)
        return lambda: linear_log_prob(hidden, weight, index % 50, rows=index, chunk_rows=CHUNK)

    assert growth(device, make) <= ROW_BYTES + 64


def test_keyed_dropout_holds_its_results_and_no_mask(device) -> None:
    def forward(rows):
        hidden, keys = states(rows, device, grad=True), torch.arange(rows, device=device)
        return lambda: keyed_dropout(hidden, keys, 1, 0.05)

    def backward(rows):
        kept = forward(rows)()
        return lambda: kept.backward(kept.detach())

    for make in (forward, backward):
        # The keys' hashes take four bytes a row, and eight more on the way.
        assert growth(device, make) <= ROW_BYTES + 32
