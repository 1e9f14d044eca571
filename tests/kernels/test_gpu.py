"""What only a GPU shows: no host sync, equal results on every run, large offsets, memory on the device."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import assert_matches, spread
from op_calls import CALLS
from repbend_kernels import bend_tap, linear_kl_div, linear_log_prob, pairwise_cosine, tap_rows, window_distance

from benchmarks.measure import peak_bytes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nan_filled_memory() -> None:
    """The mode that fills memory changes kernels and may wait for the device, which these tests look for."""


def step(hidden, reference, rows, mask, weight, targets):
    """Every op once, forward and backward."""
    leaf = hidden.detach().requires_grad_()
    stream, loss = bend_tap(leaf * 1, reference.clone(), rows)
    stream, copy = tap_rows(stream, rows)
    total = loss + window_distance([stream], [torch.zeros_like(hidden)], mask) + pairwise_cosine(copy[None])
    total = (
        total + linear_kl_div(copy, reference, weight, temperature=2.0) + linear_log_prob(copy, weight, targets).sum()
    )
    total.backward()
    return total.detach(), leaf.grad


def step_inputs():
    rows = torch.arange(0, 64, 3, device=CUDA)
    hidden, reference = (
        spread((2, 32, 256), torch.bfloat16, CUDA, 1),
        spread((rows.numel(), 256), torch.bfloat16, CUDA, 2),
    )
    weight, mask = spread((1000, 256), torch.bfloat16, CUDA, 3), torch.ones(2, 32, dtype=torch.bool, device=CUDA)
    return hidden, reference, rows, mask, weight, torch.arange(rows.numel(), device=CUDA)


def test_no_host_sync() -> None:
    inputs = step_inputs()
    step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_on_every_run() -> None:
    inputs = step_inputs()
    value, grad = step(*inputs)
    for _ in range(5):
        again, again_grad = step(*inputs)
        assert torch.equal(value, again)
        assert torch.equal(grad, again_grad)


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_through_inductor(name: str) -> None:
    import op_calls

    torch.compiler.reset()
    moved = {key: value for key, value in vars(op_calls).items() if isinstance(value, torch.Tensor)}
    try:
        for key, value in moved.items():
            setattr(op_calls, key, value.to(CUDA))
        layers, op_calls.LAYERS = op_calls.LAYERS, [t.to(CUDA) for t in op_calls.LAYERS]
        results = []
        for function in (CALLS[name], torch.compile(CALLS[name], fullgraph=True)):
            leaf = spread((2, 3, 8), torch.float32, CUDA, 1).requires_grad_()
            value = function(leaf)
            value.backward()
            results.append((value.detach(), leaf.grad))
        for got, expected in zip(results[1], results[0]):
            assert_matches(got, expected, tolerance=1e-5)
    finally:
        for key, value in moved.items():
            setattr(op_calls, key, value)
        op_calls.LAYERS = layers


def test_offsets_beyond_32_bits() -> None:
    """600k rows of 4096 pass 2³¹ elements; the last rows must be read and written where they are."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    count, width = 600_000, 4096
    hidden = torch.zeros(1, count, width, dtype=torch.bfloat16, device=CUDA)
    hidden[0, -1] = 1
    rows = torch.tensor([0, count - 1], device=CUDA)
    leaf = hidden.requires_grad_()
    _, loss = bend_tap(leaf, torch.zeros(2, width, dtype=torch.bfloat16, device=CUDA), rows)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == 64.0
    assert_matches(grad[0, -1], torch.full((width,), 1 / 64), tolerance=1e-6)
    assert grad[0, :-1].count_nonzero().item() == 0


def test_logits_of_a_chunk_stay_in_two_buffers() -> None:
    hidden, reference = spread((2048, 512), torch.bfloat16, CUDA, 1), spread((2048, 512), torch.bfloat16, CUDA, 2)
    weight = spread((32000, 512), torch.bfloat16, CUDA, 3)
    leaf = hidden.requires_grad_()

    def call() -> None:
        linear_kl_div(leaf, reference, weight, chunk_rows=256).backward()

    call()
    leaf.grad = None
    assert peak_bytes(call, CUDA) <= 2 * 4 * 256 * 32000 + 6 * 4 * 2048 * 512 + (16 << 20)


@pytest.mark.parametrize("name", ["linear_kl_div", "linear_log_prob"])
def test_packing_overtakes_no_warp_that_still_reads(name: str) -> None:
    """A 16-bit gradient is packed over the float32 row that other warps read: without a barrier that is a race, lost
    now and then.

    The same kernel, which leaves a float32 gradient where each element was, and a cast give the bits that have to come.
    """
    # Imported here: without a GPU the package of the kernels may be absent.
    from repbend_kernels.triton import linear_kl_div as kl_kernel
    from repbend_kernels.triton import linear_log_prob as log_prob_kernel

    rows, vocabulary = 512, 128256
    student, teacher = (
        spread((rows, vocabulary), torch.float32, CUDA, 1),
        spread((rows, vocabulary), torch.float32, CUDA, 2),
    )
    targets = torch.arange(rows, device=CUDA) * 250
    values = torch.empty(rows, device=CUDA)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        if name == "linear_kl_div":
            return kl_kernel.launch_chunk(student.clone(), teacher.clone(), values, 2.0, None, True, dtype)
        return log_prob_kernel.launch_chunk(student.clone(), targets, values, 1.0, None, True, dtype)

    expected, expected_values = gradient(torch.float32).bfloat16(), values.clone()
    for turn in range(50):
        assert torch.equal(gradient(torch.bfloat16), expected), f"run {turn}"
        assert torch.equal(values, expected_values), f"run {turn}"
