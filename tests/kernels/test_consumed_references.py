"""References that an op has overwritten are refused wherever they would be compared with again, until somebody refills
them.
"""

from __future__ import annotations

import pytest
import torch
from kernel_compare import assert_matches, spread
from repbend_kernels import bend_distance, bend_tap, window_distance
from torch.utils.checkpoint import checkpoint

ROWS = torch.tensor([4, 0, 3])
HELD = "holds directions already.*refill it, and keep taps outside checkpointed regions"


def states(device, seed: int = 1, grad: bool = True) -> torch.Tensor:
    return spread((2, 3, 8), torch.float32, device, seed).requires_grad_(grad)


def consumed(device, implementation) -> torch.Tensor:
    """References [3, 8] after a tap."""
    reference = spread((3, 8), torch.float32, device, 2)
    bend_tap(states(device), reference, ROWS.to(device), implementation=implementation)
    return reference


ALIASES = {
    "itself": lambda r: r,
    "detached": lambda r: r.detach(),
    "view": lambda r: r.view(24).view(3, 8),
    "whole of a part": lambda r: r.view(3, 2, 4).view(3, 8),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES.keys())
def test_a_tensor_tapped_twice(implementation, device, alias) -> None:
    reference, rows = consumed(device, implementation), ROWS.to(device)
    with pytest.raises(RuntimeError, match=f"reference_rows: this memory {HELD}"):
        bend_tap(states(device, 3), alias(reference), rows, implementation=implementation)


def test_other_readers_of_references(implementation, device) -> None:
    reference, rows = consumed(device, implementation), ROWS.to(device)
    hidden = states(device, 3)
    with pytest.raises(RuntimeError, match=f"reference_rows: this memory {HELD}"), torch.no_grad():
        bend_tap(hidden, reference, rows, implementation=implementation)
    with pytest.raises(RuntimeError, match=f"reference_rows: this memory {HELD}"):
        bend_tap(hidden, reference[1:2], rows, implementation=implementation)
    with pytest.raises(RuntimeError, match=f"reference: this memory {HELD}"):
        bend_distance(hidden, reference, rows, implementation=implementation)
    with pytest.raises(RuntimeError, match=rf"references\[0\]: this memory {HELD}"):
        window_distance([hidden[0]], [reference], None, implementation=implementation)


def test_parts_of_one_buffer_are_told_apart(implementation, device) -> None:
    buffer, rows = spread((3, 3, 8), torch.float32, device, 2), ROWS.to(device)
    for part in buffer:
        bend_tap(states(device), part, rows, implementation=implementation)
    for part in buffer:
        with pytest.raises(RuntimeError, match=HELD):
            bend_tap(states(device), part, rows, implementation=implementation)


@pytest.mark.parametrize("refill", ["copy_", "through a view", "increment_version"])
def test_refilled_references_are_read_again(implementation, device, refill) -> None:
    reference, rows = consumed(device, implementation), ROWS.to(device)
    fresh = spread((3, 8), torch.float32, device, 5)
    if refill == "copy_":
        reference.copy_(fresh)
    elif refill == "through a view":
        reference.view(-1).copy_(fresh.view(-1))
    else:
        reference.data.copy_(fresh)
        torch.autograd.graph.increment_version(reference)
    leaf = states(device, 3)
    bend_tap(leaf, reference, rows, implementation=implementation)[1].backward()
    other = leaf.detach().double().requires_grad_()
    bend_tap(other, fresh.double(), rows, implementation="eager")[1].backward()
    assert_matches(leaf.grad, other.grad, tolerance=3e-6)


def test_a_limit_and_a_second_write_to_the_directions_do_not_hide_them(implementation, device) -> None:
    reference, rows = spread((3, 8), torch.float32, device, 2), ROWS.to(device)
    bend_tap(states(device), reference, rows, limit=1.0, implementation=implementation)
    with pytest.raises(RuntimeError, match=HELD):
        bend_tap(states(device), reference, rows, implementation=implementation)


@pytest.mark.parametrize("backward", [False, True])
def test_a_consumed_window(implementation, device, backward) -> None:
    """Before backward its references hold directions, after it gradients."""
    hiddens, buffer = [states(device, 1), states(device, 2)], spread((2, 2, 3, 8), torch.float32, device, 3)
    loss = window_distance(hiddens, list(buffer), None, consume_references=True, implementation=implementation)
    if backward:
        loss.backward()
    for consume in (False, True):
        with pytest.raises(RuntimeError, match=rf"references\[0\]: this memory {HELD}"):
            window_distance(hiddens, list(buffer), None, consume_references=consume, implementation=implementation)


def test_memory_that_would_be_overwritten_belongs_to_nobody_else(implementation, device) -> None:
    hidden, reference = states(device), states(device, 2, grad=False)
    with pytest.raises(
        RuntimeError, match="references: this call overwrites it, but it shares memory with other references"
    ):
        window_distance(
            [hidden, hidden * 2], [reference, reference], None, consume_references=True, implementation=implementation
        )
    with pytest.raises(RuntimeError, match="references: this call overwrites it, but it shares memory with hiddens"):
        window_distance([hidden], [hidden.detach()], None, consume_references=True, implementation=implementation)
    rows = torch.arange(6, device=device)
    with pytest.raises(RuntimeError, match="reference_rows: this call overwrites it, but it shares memory with hidden"):
        bend_tap(hidden, hidden.detach().view(6, 8), rows, implementation=implementation)
    # Nothing was overwritten, nothing is held against it.
    window_distance([hidden], [reference], None, consume_references=True, implementation=implementation)


def block(implementation, reference, rows):
    def call(hidden: torch.Tensor) -> torch.Tensor:
        stream, loss = bend_tap(hidden.tanh(), reference, rows, implementation=implementation)
        return stream.sum() * 0.5 + loss

    return call


def test_a_tap_that_a_checkpoint_runs_again(implementation, device) -> None:
    reference, rows = spread((3, 8), torch.float32, device, 2), ROWS.to(device)
    loss = checkpoint(block(implementation, reference, rows), states(device), use_reentrant=False)
    with pytest.raises(RuntimeError, match=HELD):
        loss.backward()


def test_a_reentrant_checkpoint_reads_the_references_once(implementation, device) -> None:
    """Its first pass has no gradient, so only the second overwrites; a third is refused."""
    reference, rows = spread((3, 8), torch.float32, device, 2), ROWS.to(device)
    leaf, other = states(device), states(device).detach().double().requires_grad_()
    block("eager", reference.double(), rows)(other).backward()
    loss = checkpoint(block(implementation, reference, rows), leaf, use_reentrant=True)
    loss.backward(retain_graph=True)
    assert_matches(leaf.grad, other.grad, tolerance=3e-6)
    with pytest.raises(RuntimeError, match=HELD):
        loss.backward()


def test_a_copy_of_the_references_makes_a_checkpoint_right(implementation, device) -> None:
    reference, rows = spread((3, 8), torch.float32, device, 2), ROWS.to(device)
    leaf, other = states(device), states(device).detach().double().requires_grad_()
    block("eager", reference.double(), rows)(other).backward()
    checkpoint(lambda h: block(implementation, reference.clone(), rows)(h), leaf, use_reentrant=False).backward()
    assert_matches(leaf.grad, other.grad, tolerance=3e-6)
