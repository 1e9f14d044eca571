"""A loss that is not finite stops the run with step, term and last good checkpoint named, before it reaches the
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tiny_run import TinyRun, adapter_of, rows

from repbend_fast.cli import main
from repbend_fast.step import StreamResult, StreamRunner
from repbend_fast.training.checkpoint import adapter_weights
from repbend_fast.training.trainer import Trainer


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """``spoil(step, term, value)`` makes a term of that step's loss ``value``; returns the weights met at the end."""

    def install(step: int, term: str, value: float) -> list[dict[str, torch.Tensor]]:
        met: list[dict[str, torch.Tensor]] = []
        backward, train_step = StreamRunner.backward, Trainer._train_step
        now: list[int] = []

        def spoiled(self: StreamRunner, *args: object, **named: object) -> StreamResult:
            result = backward(self, *args, **named)  # type: ignore[arg-type]
            if now[-1] == step and term in result.terms:
                result.terms[term] = torch.tensor(value)
                result.loss = result.loss + value
            return result

        def stepped(self: Trainer, *args: object) -> None:
            now.append(self.step + 1)
            before = adapter_weights(self.model)
            try:
                train_step(self, *args)  # type: ignore[arg-type]
            finally:
                met[:] = [before, adapter_weights(self.model)]

        monkeypatch.setattr(StreamRunner, "backward", spoiled)
        monkeypatch.setattr(Trainer, "_train_step", stepped)
        return met

    return install


@pytest.mark.parametrize(("term", "value"), [("unsafe", math.inf), ("kl", math.nan), ("cosine", -math.inf)])
def test_the_term_is_named_and_the_weights_are_not_touched(
    term: str,
    value: float,
    tiny: TinyRun,
    spoil: Callable[..., list[dict[str, torch.Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    met = spoil(4, term, value)
    assert main(["train", str(tiny.recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: step 4: the loss is not finite (term {term}); last good checkpoint: "
        f"{tiny.path / 'checkpoints'}/step-000002;"
    )
    assert error.count("\n") == 1
    assert all(torch.equal(met[0][name], met[1][name]) for name in met[0])
    assert rows(tiny.path, "event")[-1] | {"type": 0} == {
        "type": 0,
        "step": 3,
        "event": "not_finite",
        "reason": f"the loss is not finite (term {term})",
    }


def test_a_gradient_that_is_not_finite_stops_too(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def broken(parameters: list[torch.nn.Parameter], norm: float) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            assert parameters[1].grad is not None
            parameters[1].grad[0, 0] = math.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    assert main(["train", str(tiny.recipe)]) == 2
    assert "step 2: the gradient is not finite; no checkpoint before it is known to be good" in capsys.readouterr().err


def test_a_checkpoint_whose_next_step_fails_is_not_called_good(
    tiny: TinyRun, spoil: Callable[..., list[dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(3, "kl", math.inf)
    assert main(["train", str(tiny.recipe), "training.checkpoint_every=1"]) == 2
    error = capsys.readouterr().err
    assert (
        f"last good checkpoint: {tiny.path / 'checkpoints'}/step-000001; remove step-000002, lower "
        "training.learning_rate" in error
    )


@pytest.mark.parametrize("rate", ["1e15", "1e30"])
def test_a_huge_learning_rate_stops_and_leaves_the_best_adapter(
    rate: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        f"training.learning_rate={rate}",
        "training.schedule=constant",
        "training.warmup_steps=0",
        "training.checkpoint_every=1",
    ]
    assert main(["train", str(tiny.recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: step 2: the ")
    assert "is not finite" in error
    assert "lower training.learning_rate or the term's weight and start again" in error
    assert all(not weight.any() for name, weight in adapter_of(tiny.path).items() if "lora_B" in name)
