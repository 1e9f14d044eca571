"""Every op in every situation that an importer meets: the right gradient, or an error. The table is the one in
``docs/ops.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_compare import assert_matches, spread, strided
from repbend_kernels import (
    bend_distance,
    bend_tap,
    gated_product,
    keyed_dropout,
    linear_kl_div,
    linear_log_prob,
    linear_lowered_label,
    lora_down,
    lora_up,
    pairwise_cosine,
    rms_norm,
    tap_rows,
    triplet_tap,
    window_distance,
)
from repbend_kernels.blocks import row_hashes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "ops.md"
WIDTH, WORDS = 8, 12
Call = Callable[[Tensor, str], Tensor]


class Setup:
    """Arguments beside the hidden states [2, 3, 8] (or [1, 1, 8], [2, 0, 8]), made once, in any dtype."""

    def __init__(
        self, shape=(2, 3, WIDTH), dtype=torch.float32, device="cpu", *, masked=False, ignored=False, trainable=False
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.shape, count = shape, shape[0] * shape[1]
        self.hidden = self.values(*shape, seed=1)
        self.rows = torch.tensor([4, 0, 3], device=device)[: count if count < 3 else 3] % max(count, 1)
        picked = len(self.rows)
        self.reference, self.layers = (
            self.values(picked, WIDTH, seed=2),
            [self.values(*shape, seed=3), self.values(*shape, seed=4)],
        )
        self.mask = torch.arange(count, device=device).view(shape[:-1]) % 2 == 0
        self.keys = torch.arange(count, device=device)
        self.weight, self.bias, self.states = (
            self.values(WORDS, WIDTH, seed=7),
            self.values(1, WORDS, seed=8)[0],
            self.values(picked, WIDTH),
        )
        if masked:
            self.bias[3] = -float("inf")
        self.targets = torch.tensor([5, 0, 11], device=device)[:picked]
        if ignored:
            self.targets[0] = -100
        self.weight.requires_grad_(trainable)

    def values(self, *shape: int, seed: int = 9) -> Tensor:
        return spread(shape, torch.float32, self.device, seed).to(self.dtype)

    def others(self, dtype: torch.dtype) -> Setup:
        """The same beside hidden states of another dtype."""
        for name in ("reference", "weight", "bias", "states"):
            setattr(self, name, getattr(self, name).to(dtype))
        self.layers = [layer.to(dtype) for layer in self.layers]
        return self


def _tap(s: Setup, kind: str) -> Call:
    def call(hidden: Tensor, implementation: str) -> Tensor:
        stream, loss = bend_tap(hidden.tanh(), s.reference, s.rows, kind=kind, implementation=implementation)
        return (stream * 0.5).sum() + loss

    return call


def _tap_rows(s: Setup) -> Call:
    def call(hidden: Tensor, implementation: str) -> Tensor:
        stream, copy = tap_rows(hidden * 1, s.rows, implementation=implementation)
        return (stream * 0.5).square().sum() + copy.pow(3).sum()

    return call


def _window(s: Setup, consume: bool) -> Call:
    return lambda h, i: window_distance(
        [h * 1, h * 2], s.layers, s.mask, kind="mse", consume_references=consume, implementation=i
    )


def _triplets(s: Setup) -> Call:
    def call(hidden: Tensor, implementation: str) -> Tensor:
        halves = s.rows[:2], s.rows[2:]
        stream, loss, _ = triplet_tap(
            hidden.tanh(), s.reference, halves, weights=(0.7, 1.3), margins=(2.0, 2.0), implementation=implementation
        )
        return (stream * 0.5).sum() + loss

    return call


def _down(s: Setup) -> Call:
    def call(hidden: Tensor, implementation: str) -> Tensor:
        x, down = lora_down(
            hidden.reshape(-1, WIDTH) * 1, s.weight[:4], row_hashes(s.keys), 3, 0.4, implementation=implementation
        )
        return (x * 0.5).square().sum() + down.square().sum()

    return call


def _up(s: Setup) -> Call:
    def call(hidden: Tensor, implementation: str) -> Tensor:
        rows = hidden.reshape(-1, WIDTH)
        return (
            lora_up(rows * 1, (rows * 2)[:, :4], s.weight[:WIDTH, :4], 1.5, implementation=implementation).pow(3).sum()
        )

    return call


OPS: dict[str, Callable[[Setup], Call]] = {
    "bend_tap": lambda s: _tap(s, "mse"),
    "tap_rows": _tap_rows,
    "bend_distance": lambda s: lambda h, i: bend_distance(h * 1, s.reference, s.rows, kind="mse", implementation=i),
    "window_distance": lambda s: _window(s, False),
    "… consume_references": lambda s: _window(s, True),
    "pairwise_cosine": lambda s: lambda h, i: pairwise_cosine(h * 1, implementation=i),
    "linear_kl_div": lambda s: (
        lambda h, i: linear_kl_div(
            h.reshape(-1, WIDTH) * 1,
            s.states,
            s.weight,
            rows=s.rows,
            bias=s.bias,
            temperature=2.0,
            reduction="mean",
            implementation=i,
        )
    ),
    "linear_log_prob": lambda s: (
        lambda h, i: linear_log_prob(
            h.reshape(-1, WIDTH) * 1, s.weight, s.targets, rows=s.rows, bias=s.bias, implementation=i
        ).sum()
    ),
    "linear_lowered_label": lambda s: (
        lambda h, i: linear_lowered_label(
            (h.reshape(-1, WIDTH) * 1)[s.rows],
            s.weight,
            s.targets.clamp(min=0),
            lowered=2.0,
            reference=s.states,
            bias=s.bias,
            implementation=i,
        ).sum()
    ),
    "keyed_dropout": lambda s: lambda h, i: keyed_dropout(h * 1, s.keys, 3, 0.4, implementation=i).pow(3).sum(),
    "triplet_tap": _triplets,
    "rms_norm": lambda s: lambda h, i: rms_norm(h * 1, s.weight[0], 1e-5, implementation=i).pow(3).sum(),
    "gated_product": lambda s: lambda h, i: gated_product(h * 1, h * 2, "gelu_tanh", implementation=i).sum(),
    "lora_down": _down,
    "lora_up": _up,
}
Outcome = tuple[Tensor, ...]


def plain(call: Call, hidden: Tensor, implementation: str, around: Callable | None = None) -> Outcome:
    """Loss and gradient."""
    leaf = hidden.detach().as_strided(hidden.shape, hidden.stride(), hidden.storage_offset()).requires_grad_()
    loss = call(leaf, implementation) if around is None else around(lambda h: call(h, implementation), leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def second(call: Call, hidden: Tensor, implementation: str) -> Outcome:
    """The gradient of a penalty on the gradient."""
    leaf = hidden.detach().requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf, implementation), leaf, create_graph=True)
    (penalty,) = torch.autograd.grad(grad.square().sum(), leaf)
    return grad.detach(), penalty


def forward_mode(call: Call, hidden: Tensor, implementation: str) -> Outcome:
    """The derivative along one direction, beside the value."""
    return torch.func.jvp(lambda x: call(x, implementation), (hidden.detach(),), (torch.ones_like(hidden),))


def compiled(call: Call, hidden: Tensor, implementation: str) -> Outcome:
    torch.compiler.reset()
    return plain(call, hidden, implementation, lambda f, h: torch.compile(f, fullgraph=True, backend="aot_eager")(h))


def autocast(call: Call, hidden: Tensor, implementation: str) -> Outcome:
    with torch.autocast(hidden.device.type, torch.bfloat16):
        return plain(call, hidden, implementation)


def keep(call: Call, hidden: Tensor, implementation: str) -> Outcome:
    return plain(call, hidden, implementation)


SITUATIONS: dict[str, tuple[Callable, dict]] = {
    "checkpoint": (lambda c, h, i: plain(c, h, i, lambda f, x: checkpoint(f, x, use_reentrant=False)), {}),
    "checkpoint, reentrant": (lambda c, h, i: plain(c, h, i, lambda f, x: checkpoint(f, x, use_reentrant=True)), {}),
    "create_graph=True": (second, {}),
    "forward mode": (forward_mode, {}),
    "autocast": (autocast, {}),
    "bf16 beside float32": (keep, {"mixed": True}),
    "compile, fullgraph": (compiled, {}),
    "frozen head": (keep, {"heads": True}),
    "trainable head": (keep, {"heads": True, "trainable": True}),
    "gaps": (keep, {"layout": "sliced"}),
    "transposed": (keep, {"layout": "transposed"}),
    "0 rows": (keep, {"shape": (2, 0, WIDTH)}),
    "1 row": (keep, {"shape": (1, 1, WIDTH)}),
    "−inf bias": (keep, {"heads": True, "masked": True}),
    "target −100": (keep, {"labels": True, "ignored": True}),
}


def applies(op: str, situation: str) -> bool:
    options = SITUATIONS[situation][1]
    if options.get("labels"):
        return op == "linear_log_prob"
    if options.get("mixed"):
        return op not in ("tap_rows", "pairwise_cosine", "keyed_dropout", "rms_norm", "gated_product", "lora_down")
    return op.startswith("linear") or not options.get("heads")


def table() -> dict[tuple[str, str], str]:
    """``docs/ops.md``'s cells by (op, situation)."""
    lines = DOCS.read_text(encoding="utf-8").split("## What is right where\n")[1].split("\n## ")[0].split("\n\n")
    grid = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for t in lines
        if t.startswith("|")
        for line in t.splitlines()
    ]
    head, body = grid[0][1:], grid[2:]
    return {(op, row[0]): cell for row in body for op, cell in zip(head, row[1:])}


def test_the_table_has_every_op_and_situation() -> None:
    expected = {(op, situation): applies(op, situation) for op in OPS for situation in SITUATIONS}
    cells = table()
    assert set(cells) == set(expected)
    for key, cell in cells.items():
        assert cell in (("right", "refused") if expected[key] else ("–",)), key


@pytest.mark.parametrize(
    ("op", "situation"), [(op, situation) for op in OPS for situation in SITUATIONS if applies(op, situation)]
)
def test_situation(implementation, device, op, situation) -> None:
    if implementation == "triton" and device.type == "cpu" and situation == "compile, fullgraph":
        pytest.skip("no compiler where kernels are interpreted")
    run, options = SITUATIONS[situation]
    made = {key: options[key] for key in ("shape", "masked", "ignored", "trainable") if key in options}
    setup = Setup(device=device, **made)
    hidden = strided(setup.hidden, options.get("layout", "contiguous"))
    if options.get("mixed"):
        hidden = hidden.to(torch.bfloat16)
    if table()[op, situation] == "refused":
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            run(OPS[op](setup), hidden, implementation)
        reasons = (
            "expected",
            "directions already",
            "no second derivatives",
            "no autograd formula",
            "no forward-mode derivatives",
        )
        assert any(word in str(caught.value) for word in reasons)
        return
    double = Setup(device=device, **made).others(torch.float64)
    want = (second if run is second else keep)(OPS[op](double), setup.hidden.double(), "eager")
    for got, expected in zip(run(OPS[op](setup), hidden, implementation), want):
        assert_matches(got, expected, tolerance=2e-5)
