"""A run that ran out of memory goes on as the run that did not, says so once, and stays careful after resuming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import TinyRun, adapter_of, rows

from repbend_fast.cli import main
from repbend_fast.step import adapted, reference
from repbend_fast.step.terms import head_kl, pairwise
from repbend_fast.training.trainer import Trainer

SHORT = ("validation.every=0", "training.schedule=constant", "training.warmup_steps=0")


def break_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: int, nth: int = 2) -> None:
    """The ``nth`` call of ``owner.name`` in training step ``step`` finds no memory."""
    real, train_step, now = getattr(owner, name), Trainer._train_step, {"step": 0, "call": 0}

    def stepped(self: Trainer, *args: object) -> None:
        now.update(step=self.step + 1, call=0)
        train_step(self, *args)  # type: ignore[arg-type]

    def broken(*args: Any, **kwargs: Any) -> Any:
        now["call"] += 1
        if (now["step"], now["call"]) == (step, nth):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **kwargs)

    monkeypatch.setattr(Trainer, "_train_step", stepped)
    monkeypatch.setattr(owner, name, broken)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(sum((a[k] - b[k]).square().sum() for k in a).sqrt() / sum(v.square().sum() for v in b.values()).sqrt())  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tiny_model, tmp_path_factory.mktemp("undisturbed"))
    run.train(*SHORT)
    return run


PHASES = {
    "reference": (reference, "run_decoder", ()),
    "adapted": (adapted, "run_decoder", ()),
    "head": (head_kl, "linear_kl_div", ()),
    "backward": (torch.Tensor, "backward", ()),
    "pairwise": (pairwise, "run_decoder", ("memory.piece_tokens=64",)),
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_run_is_the_one_that_had_enough(phase, tiny: TinyRun, undisturbed: TinyRun, monkeypatch, capsys) -> None:
    owner, name, overrides = PHASES[phase]
    break_call(monkeypatch, owner, name, step=3)
    tiny.train(*SHORT, *overrides)
    expected, found = rows(undisturbed.path, "step"), rows(tiny.path, "step")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for got, row in zip(found, expected):
        assert got["tokens"] == row["tokens"]
        assert got["loss"] == pytest.approx(row["loss"], rel=1e-3, abs=1e-4)
        assert got["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    assert distance(adapter_of(tiny.path), adapter_of(undisturbed.path)) < 2e-3
    (event,) = [row for row in rows(tiny.path, "event") if row["event"] == "out_of_memory"]
    assert event["step"] == 2
    assert event["reason"].startswith("out of memory (stream ")
    assert event["allocator"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    # A piece of several sequences is halved; of a single one, as in the last case, the blocks are recomputed.
    sizes = [v for k, v in event["levers"]["piece_tokens"].items() if k != "*"]
    change = f"pieces of at most {sizes[0]} tokens" if sizes else "all blocks recomputed in backward"
    assert (len(sizes), event["levers"]["checkpoint_blocks"] > 0) == ((0, True) if phase == "pairwise" else (1, False))
    assert event["reason"].endswith(f": {change} from here on")
    assert capsys.readouterr().out.count(event["reason"]) == 1


def test_another_run_differs_by_far_more(tiny: TinyRun, undisturbed: TinyRun) -> None:
    tiny.train(*SHORT, "lora.dropout=0.21")
    assert distance(adapter_of(tiny.path), adapter_of(undisturbed.path)) > 2e-2


def levers_after_resuming(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Any:
    seen: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, validator: (seen.append(self.runner.levers), fit(self, validator))[1]
    )
    tiny.resume("training.steps=6", *overrides)
    return seen[0]


def test_a_resumed_run_keeps_what_it_learnt(tiny: TinyRun, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        break_call(patch, adapted, "run_decoder", step=2)
        tiny.train(*SHORT, "training.steps=4")
    (event,) = [row for row in rows(tiny.path, "event") if row["event"] == "out_of_memory"]
    levers = levers_after_resuming(tiny, monkeypatch)
    assert levers.as_dict() == event["levers"]
    assert len([row for row in rows(tiny.path, "event") if row["event"] == "out_of_memory"]) == 1


def test_levers_set_anew_on_resuming_win(tiny: TinyRun, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        break_call(patch, adapted, "run_decoder", step=2)
        tiny.train(*SHORT, "training.steps=4")
    levers = levers_after_resuming(tiny, monkeypatch, "memory.piece_tokens=77")
    assert dict(levers.piece_tokens) == {"*": 77}


def test_the_optimizer_has_a_remedy(tiny: TinyRun, monkeypatch, capsys) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    assert main(["train", str(tiny.recipe), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: step 1: out of memory in the optimizer (training.optimizer=adamw); set training.optimizer=adamw_8bit,"
    )
    assert error.count("\n") == 1
