"""Every op says what it needs inside: a rule for each, by the names of its arguments, that bounds what the allocator
sees.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from kernel_compare import spread
from repbend_kernels import scratch
from repbend_kernels.blocks import row_hashes
from repbend_kernels.rows import CPU_ELEMENTS_PER_THREAD

from benchmarks.measure import peak_bytes

CPU = torch.device("cpu")
N, D, V, R = 2048, 512, 4096, 1500
# What a call may hold beside its rule whatever the sizes: the last blocks' results, held over into the next; scalars of
# rows, indices.
SMALL = 2 * 4 * CPU_ELEMENTS_PER_THREAD + 12 * 8 * N


def registered() -> set[str]:
    """Every op of the package that torch knows, without its overload's name."""
    return {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{scratch.NAMESPACE}::")
    }


def schema_names(name: str) -> list[str]:
    """The names of an op's arguments."""
    op = getattr(torch.ops.repbend_kernels, name.partition("::")[2]).default
    return [argument.name for argument in op._schema.arguments]


def test_every_op_has_a_rule() -> None:
    assert set(scratch.scratch_rules()) == registered()


def test_an_op_without_a_rule_is_noticed(monkeypatch) -> None:
    monkeypatch.delitem(scratch._RULES, "repbend_kernels::scale_")
    assert registered() - set(scratch.scratch_rules()) == {"repbend_kernels::scale_"}
    with pytest.raises(KeyError, match="scale_"):
        scratch.scratch_bytes("repbend_kernels::scale_", CPU, ([torch.zeros(3)], torch.zeros(())))


@pytest.mark.parametrize("name", sorted(scratch.scratch_rules()))
def test_a_rule_names_arguments_of_its_op(name: str) -> None:
    assert set(inspect.signature(scratch.scratch_rules()[name]).parameters) <= {"device", *schema_names(name)}


def values(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return spread(shape, dtype, CPU, seed)


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of every op, large enough for several blocks of rows and small enough to be quick."""
    hidden, other, rows = values(N, D, dtype=dtype), values(N, D, seed=2, dtype=dtype), torch.randperm(N)[:R]
    picked, place = values(R, D, seed=3, dtype=dtype), torch.empty(0, dtype=torch.int32)
    hashes, a, b = row_hashes(torch.arange(N)), values(8, D, seed=4), values(D, 8, seed=5)
    down, row, weight = values(N, 8, seed=6), values(1, D, seed=7)[0], values(V, D, seed=8, dtype=dtype)
    triplets = (hidden, picked, rows, R // 2, row / row.norm(), [2.0, 2.0], 1.0)
    scales = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + 1e-5)
    narrow = row.to(dtype)
    packed, table = torch.randint(0, 256, (R * D // 2, 1), dtype=torch.uint8), values(2, 8).view(16)
    levels = torch.randint(0, 256, (R * D // 64,), dtype=torch.uint8)
    scales4 = levels, values(2, 128).view(256), values(1, -(-levels.numel() // 256))[0], values(1, 1)[0, 0]
    return {
        "bend_tap_forward": (hidden, picked, None, rows, "cosine", "torch"),
        "bend_tap_backward": (other, picked, rows, place, torch.tensor(0.5), [N, D], "torch"),
        "gather_rows": (hidden, rows, "torch", True),
        "add_rows": (other, picked, rows, place, [N, D], "torch"),
        "row_distance": ([hidden], [other], None, None, "cosine", "torch"),
        "row_distance_backward": (hidden, other, None, None, "cosine", torch.ones(N), "torch"),
        "row_distance_consume": ([hidden], [other], None, "cosine", "torch"),
        "scale_": ([other], torch.tensor(0.5)),
        "pairwise_similarity": (hidden[None], "torch"),
        "pairwise_similarity_backward": (hidden[None], values(1, D), torch.ones(1, N), torch.ones(1), "torch"),
        "linear_kl_div": (hidden[:300], other[:300], weight, None, weight, None, 2.0, None, 64, True, "torch", None),
        "linear_log_prob": (hidden[:300], weight, None, torch.arange(300), 1.0, None, 64, True, "torch", None, None),
        "linear_lowered_label": (hidden[:300], other[:300], weight, None, torch.arange(300), 10.0, None, 64, True),
        "keyed_dropout": ([hidden], torch.arange(N), 3, 2**30, 2.0, "torch"),
        "unit_sums": (hidden, rows),
        "triplet_values": triplets,
        "triplet_directions": (*triplets, [1.0, 0.5]),
        "add_to_rows_": (picked, row),
        "rms_norm": (hidden, narrow, 1e-5, True),
        "rms_norm_gradient": (other, hidden, narrow, scales, True),
        "gated_product": (hidden, other, "gelu_tanh"),
        "gated_product_gradients": (picked, hidden[:R], other[:R], "silu"),
        "dequantize_nf4": (packed, table, *scales4, R, D, 64, torch.bfloat16, "torch"),
        "low_rank_down": (hidden, [a, a[:1]], hashes, 3, 0.4, "torch"),
        "add_low_rank_gradient_": (
            other,
            hidden,
            [a, a[:1]],
            [down, down[:, :1]],
            hashes,
            3,
            0.4,
            [True, True],
            "torch",
        ),
        "add_low_rank_up_": (other, down, b, 1.5, "torch"),
        "low_rank_up_gradients": (other, down, b, 1.5, [True, True], "torch"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(calls(torch.float32)))
def test_a_rule_bounds_what_a_call_takes(name: str, dtype: torch.dtype) -> None:
    arguments = calls(dtype)[name]
    op = getattr(torch.ops.repbend_kernels, name).default
    rule = scratch.scratch_bytes(f"repbend_kernels::{name}", CPU, arguments)
    assert rule >= 0
    made = op(*arguments)
    found = made if isinstance(made, (tuple, list)) else [made]
    results = sum(t.untyped_storage().nbytes() for t in found if isinstance(t, torch.Tensor))
    del made, found
    inside = peak_bytes(lambda: op(*arguments), CPU) - results
    assert 4 * R * D > 2 * SMALL, "a copy of the rows would not show"
    assert inside <= rule + SMALL, f"{inside} bytes inside, the rule says {rule}"


def test_every_op_is_measured() -> None:
    assert {f"repbend_kernels::{name}" for name in calls(torch.float32)} == registered()
