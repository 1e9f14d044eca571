"""``torch.library`` registration of every op: schema, fake rule, autograd rule, and planning with fake tensors."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import spread
from op_calls import CALLS, CPU, HASHES, KEYS, MASK, ROWS, TARGETS
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
from torch._subclasses.fake_tensor import FakeTensorMode


def values(*shape: int, seed: int = 7, grad: bool = False) -> torch.Tensor:
    return spread(shape, torch.float32, CPU, seed).requires_grad_(grad)


def op_arguments(implementation: str) -> dict[str, tuple]:
    """Arguments for each registered op."""
    hidden, weight, wide = values(2, 3, 8, grad=True), values(12, 8), values(6, 8, grad=True)
    place = torch.zeros(6 if implementation == "triton" else 0, dtype=torch.int32)
    if implementation == "triton":
        place[ROWS] = torch.arange(3, dtype=torch.int32)
    pair = [values(2, 3, 8, seed=3), values(2, 3, 8, seed=4)]
    rows, up, down = values(6, 8), values(2, 8, seed=5), values(6, 2, seed=6)
    triplets = (hidden.detach(), values(3, 8), ROWS, 2, values(8, 8)[0], [2.0, 0.5], 1.5)
    both = [True, True]
    scales = torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
    packed = torch.arange(192, dtype=torch.uint8)
    nf4 = packed[:6], values(2, 128).view(256), values(1, 8)[0], values(1, 1)[0, 0]
    return {
        "bend_tap_forward": (hidden.detach(), values(3, 8), None, ROWS, "l2", implementation),
        "bend_tap_backward": (values(2, 3, 8), values(3, 8), ROWS, place, torch.tensor(0.5), [2, 3, 8], implementation),
        "gather_rows": (hidden.detach(), ROWS, implementation, True),
        "add_rows": (None, values(3, 8), ROWS, place, [2, 3, 8], implementation),
        "row_distance": ([hidden, values(2, 3, 8, seed=9)], pair, None, MASK, "cosine", implementation),
        "row_distance_backward": (
            hidden.detach(),
            values(3, 8),
            ROWS,
            None,
            "mse",
            values(3, seed=2).reshape(3),
            implementation,
        ),
        "row_distance_consume": ([hidden.detach(), values(2, 3, 8)], pair, MASK, "l2", implementation),
        "scale_": ([values(3, 4), values(2, 2)], torch.tensor(0.5)),
        "pairwise_similarity": (values(2, 3, 8, grad=True), implementation),
        "pairwise_similarity_backward": (
            values(2, 3, 8),
            values(2, 8),
            values(2, 3).abs(),
            torch.ones(2),
            implementation,
        ),
        "linear_kl_div": (wide, values(6, 8), weight, None, weight, None, 2.0, 3.0, 4, True, implementation, None),
        "keyed_dropout": ([values(2, 3, 8, grad=True), values(2, 3, 8)], KEYS, -7, 12345 - 2**30, 2.0, implementation),
        "unit_sums": (hidden.detach(), ROWS),
        "triplet_values": triplets,
        "triplet_directions": (*triplets, [1.0, 0.3]),
        "add_to_rows_": (values(3, 8), values(8, 8)[0]),
        "rms_norm": (rows, values(8, 8)[0], 1e-5, False),
        "rms_norm_gradient": (values(6, 8, seed=2), rows, values(8, 8)[0], scales, True),
        "gated_product": (rows, values(6, 8, seed=2), "silu"),
        "gated_product_gradients": (values(6, 8, seed=3), rows, values(6, 8, seed=2), "gelu_tanh"),
        "low_rank_down": (rows, [up, up[:1] * 2], HASHES, 3, 0.4, implementation),
        "add_low_rank_gradient_": (values(6, 8, seed=2), rows, [up], [down], HASHES, 3, 0.4, both, implementation),
        "add_low_rank_up_": (rows.clone(), down, values(8, 2, seed=2), 1.5, implementation),
        "low_rank_up_gradients": (values(6, 8, seed=2), down, values(8, 2, seed=2), 1.5, both, implementation),
        "dequantize_nf4": (packed, values(2, 8).view(16), *nf4, 6, 64, 64, torch.bfloat16, implementation),
        "linear_log_prob": (wide, weight, None, TARGETS, 2.0, None, 4, True, implementation, None, -100),
        "linear_lowered_label": (wide, values(6, 8), weight, None, TARGETS, 4.0, 3.0, 4, True),
    }


OPS = list(op_arguments("torch"))


def test_every_registered_op_is_listed() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("repbend_kernels::")
    }
    assert {name.split(".")[0] for name in registered} == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(implementation, device, name) -> None:
    if device.type != "cpu":
        pytest.skip("arguments lie on the CPU")
    # An op whose gradient the caller's Function gives has no autograd rule of its own to trace.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if implementation == "torch":
        tests.append("test_aot_dispatch_dynamic")
    # The second output of this one is saved, not differentiated; uninitialised memory would hide a mutation check.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.library.opcheck(
        getattr(torch.ops.repbend_kernels, name).default, op_arguments(implementation)[name], test_utils=tests
    )


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_give_shape_and_dtype(name: str) -> None:
    real = CALLS[name](values(2, 3, 8, seed=1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(2, 3, 8, requires_grad=True)
        fake = CALLS[name](hidden)
        fake.backward()
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert hidden.grad.shape == (2, 3, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_a_large_model_is_planned_without_its_memory(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode():
        hidden = torch.empty(16, 1024, 4096, dtype=dtype, requires_grad=True)
        weight = torch.empty(128256, 4096, dtype=dtype)
        rows, flat = torch.arange(8192), hidden.reshape(-1, 4096)
        stream, loss = bend_tap(hidden, torch.empty(8192, 4096, dtype=dtype), rows)
        stream = keyed_dropout(stream, torch.zeros(16, 1024, dtype=torch.int64), 0, 0.05)
        stream, copy = tap_rows(stream, rows)
        losses = [
            loss,
            bend_distance(stream, torch.empty_like(stream)),
            window_distance([stream] * 2, [torch.empty_like(stream)] * 2, torch.ones(16, 1024, dtype=torch.bool)),
            pairwise_cosine(copy.view(2, 4096, 4096)),
            linear_kl_div(flat, torch.empty(16384, 4096, dtype=dtype), weight),
            linear_log_prob(flat, weight, torch.zeros(16384, dtype=torch.int64)).sum(),
        ]
        assert [value.dtype for value in losses] == [wide] * 6
        sum(losses).backward()
        assert (hidden.grad.shape, hidden.grad.dtype) == (hidden.shape, dtype)
