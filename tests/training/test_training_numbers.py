"""What a step does to numbers: learning rates, clipping, accumulation, optimizers, precisions, seeds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import TinyRun, adapter_of, records, reproducible, rows, same_tensors, write_model, write_records
from torch import nn
from transformers import get_scheduler, get_wsd_schedule

from repbend_fast.config.schema import TrainingConfig
from repbend_fast.errors import UserError
from repbend_fast.models import load_tokenizer
from repbend_fast.objectives import roles_of
from repbend_fast.runs.metrics import MetricsLog
from repbend_fast.runs.prepare import prepare_data
from repbend_fast.training.optimizer import build_optimizer, learning_rate
from repbend_fast.training.trainer import Trainer

STEADY = ("training.schedule=constant", "training.warmup_steps=0", "validation.every=0")
NO_PROGRESS = SimpleNamespace(update=lambda *values: None)


def make_trainer(run: TinyRun, *overrides: str) -> Trainer:
    config = run.config(
        *overrides, *(o for o in STEADY if not any(o.split("=")[0] == given.split("=")[0] for given in overrides))
    )
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    torch.manual_seed(config.training.seed)
    trainer = Trainer(config, SimpleNamespace(all_checkpoints=lambda: [], checkpoint=lambda step: None), data)  # type: ignore[arg-type]
    run.path.mkdir(exist_ok=True)
    trainer.log = MetricsLog(run.path / "metrics.jsonl")
    return trainer


def gradients(trainer: Trainer, micro_batches: int, scale: float) -> list[torch.Tensor]:
    for _ in range(micro_batches):
        for stream in trainer.objective.streams(trainer.data.sampler.next_batch(), 0):
            trainer.runner.backward(stream, scale, dropout_seed=0)
    found = [parameter.grad.clone() for parameter in trainer.parameters if parameter.grad is not None]
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> bool:
    """Relative to the size of all gradients together: a zero gradient is not close to anything but zero."""
    assert len(a) == len(b) > 0
    difference = torch.stack([(x - y).square().sum() for x, y in zip(a, b)]).sum().sqrt()
    return bool(difference <= tolerance * torch.stack([y.square().sum() for y in b]).sum().sqrt())


@pytest.mark.parametrize("warmup", [0, 1, 4, 12])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: str, warmup: int) -> None:
    config = TrainingConfig(steps=12, schedule=schedule, warmup_steps=warmup, learning_rate=3e-4)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    for step in range(12):
        assert learning_rate(config, step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(("warmup", "decay"), [(0, 1), (0, 12), (3, 4), (3, 9), (11, 1)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_late_decay_is_warmup_stable_decay_of_transformers(schedule: str, warmup: int, decay: int) -> None:
    config = TrainingConfig(  # type: ignore[arg-type]
        steps=12, schedule=schedule, warmup_steps=warmup, decay_steps=decay, learning_rate=3e-4
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=12, decay_type=schedule)
    rates = []
    for step in range(12):
        rates.append(learning_rate(config, step))
        assert rates[-1] == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        reference.step()
    assert rates[warmup : 12 - decay + 1] == [3e-4] * (12 - decay + 1 - warmup)
    assert learning_rate(config, 12) == 0


def test_annealing_falls_along_a_line_from_the_rate_at_its_start_to_zero() -> None:
    config = TrainingConfig(steps=100, schedule="cosine", warmup_steps=10, learning_rate=3e-4)
    start = learning_rate(config, 40)
    rates = [learning_rate(config, step, range(40, 60)) for step in range(64)]
    assert rates[:41] == [learning_rate(config, step) for step in range(41)]
    assert rates[40:61] == pytest.approx([start * (1 - k / 20) for k in range(21)], rel=1e-12, abs=0)
    assert rates[60:] == [0] * 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_annealing_leaves_a_schedule_that_ends_as_soon(schedule: str) -> None:
    config = TrainingConfig(steps=12, schedule=schedule, warmup_steps=2, learning_rate=3e-4)  # type: ignore[arg-type]
    for anneal in (range(4, 12), range(8, 16)):
        assert [learning_rate(config, step, anneal) for step in range(13)] == [
            learning_rate(config, step) for step in range(13)
        ]
    assert learning_rate(config, 11, range(8, 11)) == 0 != learning_rate(config, 11)


def test_annealing_a_constant_rate_ends_with_the_run_at_the_latest() -> None:
    config = TrainingConfig(steps=12, schedule="constant", learning_rate=3e-4)
    assert [learning_rate(config, step, range(8, 99)) for step in (7, 8, 10, 12)] == pytest.approx(
        [3e-4, 3e-4, 1.5e-4, 0], abs=0
    )
    # Nothing is left to anneal over: the run ends there.
    assert learning_rate(config, 12, range(12, 20)) == 0 == learning_rate(config, 8, range(8, 8))


def test_the_learning_rate_of_each_step_is_used_and_logged(tiny: TinyRun) -> None:
    tiny.train("training.learning_rate=1e-3", "validation.every=0")
    logged = [row["learning_rate"] for row in rows(tiny.path, "step")]
    assert logged == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 0.8535533905932737, 5e-4, 1e-3 * 0.14644660940672624])
    assert logged[0] == 0


def test_with_a_rate_of_zero_the_first_step_moves_nothing(tiny: TinyRun) -> None:
    trainer = make_trainer(tiny, "training.warmup_steps=2")
    before = [p.detach().clone() for p in trainer.parameters]
    trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters))
    trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters))


def test_accumulation_is_the_mean_gradient(tiny: TinyRun) -> None:
    trainer = make_trainer(tiny, "lora.dropout=0", "training.accumulation=2")
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    place = trainer.data.sampler.state_dict()
    first, second = gradients(trainer, 1, 1.0), gradients(trainer, 1, 1.0)
    mean = [(a + b) / 2 for a, b in zip(first, second)]
    assert not close(first, mean, 1e-2)
    trainer.data.sampler.load_state_dict(place)
    met: list[torch.Tensor] = []
    trainer.optimizer.step = lambda: met.extend(p.grad.clone() for p in trainer.parameters)  # type: ignore[assignment,union-attr,misc]
    trainer.config.training.clip_norm = None
    trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
    assert close(met, mean, 1e-6)


def test_the_gradient_is_clipped_to_the_norm_and_the_whole_norm_is_logged(tiny: TinyRun) -> None:
    met: dict[float | None, torch.Tensor] = {}
    for limit in (None, 1e-3):
        trainer = make_trainer(tiny, "lora.dropout=0")
        trainer.config.training.clip_norm = limit
        grads: list[torch.Tensor] = []
        trainer.optimizer.step = lambda t=trainer, g=grads: g.extend(p.grad.clone() for p in t.parameters)  # type: ignore[assignment,misc]
        trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
        met[limit] = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert rows(tiny.path, "step")[-1]["grad_norm"] == pytest.approx(float(met[None]))
    assert float(met[1e-3]) == pytest.approx(1e-3, rel=1e-3)
    assert float(met[None]) > 1e-2


def test_log_every_logs_those_steps_and_the_last(tiny: TinyRun) -> None:
    tiny.train("training.log_every=4", "validation.every=0")
    assert [row["step"] for row in rows(tiny.path, "step")] == [4, 6]


def test_a_logged_step_has_what_it_promises(whole: TinyRun) -> None:
    row = rows(whole.path, "step")[-1]
    assert set(row["terms"]) == {"safe", "unsafe", "cosine", "kl"}
    assert set(row["distance_per_layer"]["unsafe"]) == {"2", "3"}
    assert set(row["distance_per_layer"]["safe"]) == {"1", "2", "3"}
    assert row["loss"] == pytest.approx(
        0.5 * row["terms"]["safe"]
        - 0.5 * row["terms"]["unsafe"]
        + 0.1 * row["terms"]["cosine"]
        + 0.3 * row["terms"]["kl"],
        rel=1e-5,
    )
    assert row["tokens"] > 0
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert row["peak_memory_bytes"] > 2**20


PRECISIONS = {
    "float32": (),
    "bfloat16": ("model.dtype=bfloat16",),
    "bfloat16 lora": ("model.dtype=bfloat16", "lora.dtype=bfloat16"),
    "float16": ("model.dtype=float16",),
    "autocast": ("training.autocast=bfloat16",),
    "nf4": ("model.dtype=bfloat16", "model.quantization=nf4"),
    "8-bit optimizer": ("training.optimizer=adamw_8bit",),
    "recomputed in pieces": ("memory.checkpoint_blocks=all", "memory.piece_tokens=64"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_few_steps_lower_the_loss_in_every_precision(precision: str, tiny: TinyRun) -> None:
    # bitsandbytes quantises 64 weights of a row at a time.
    model = (f"model.name={write_model(tiny.folder / 'wide', width=64)}",) if precision == "nf4" else ()
    tiny.train(
        *STEADY,
        *PRECISIONS[precision],
        *model,
        "training.steps=8",
        "training.learning_rate=5e-3",
        "training.accumulation=1",
    )
    steps = rows(tiny.path, "step")
    first = steps[0]["terms"]
    assert first["safe"] == first["unsafe"] == first["kl"] == 0.0
    assert all(row["loss"] is not None for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.02
    assert all(bool(weight.isfinite().all()) for weight in adapter_of(tiny.path).values())


def test_the_8_bit_optimizer_resumes_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    whole, parted = TinyRun(tiny_model, tmp_path / "whole"), TinyRun(tiny_model, tmp_path / "parted")
    eight_bit = ("training.optimizer=adamw_8bit", "training.schedule=constant", "lora.r=128")
    whole.train(*eight_bit, "training.steps=4")
    parted.train(*eight_bit, "training.steps=2")
    parted.resume("training.steps=4")
    assert [row["loss"] for row in rows(parted.path, "step")] == [row["loss"] for row in rows(whole.path, "step")]
    assert same_tensors(adapter_of(parted.path), adapter_of(whole.path))


def test_float16_resumes_with_its_loss_scale(tiny_model: Path, tmp_path: Path) -> None:
    whole, parted = TinyRun(tiny_model, tmp_path / "whole"), TinyRun(tiny_model, tmp_path / "parted")
    half = ("model.dtype=float16", "training.schedule=constant")
    whole.train(*half, "training.steps=4")
    parted.train(*half, "training.steps=2")
    parted.resume("training.steps=4")
    assert [row["loss"] for row in rows(parted.path, "step")] == [row["loss"] for row in rows(whole.path, "step")]
    assert same_tensors(adapter_of(parted.path), adapter_of(whole.path))


def test_float16_gradients_that_overflow_are_skipped_until_there_is_no_scale_left(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny, "model.dtype=float16")
    before = [p.detach().clone() for p in trainer.parameters]
    run_backward = trainer.runner.backward

    def overflowing(*arguments: object, **named: object) -> object:
        result = run_backward(*arguments, **named)  # type: ignore[arg-type]
        for parameter in trainer.parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.inf)
        return result

    monkeypatch.setattr(trainer.runner, "backward", overflowing)
    scale = trainer.scaler.get_scale()
    trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
    assert trainer.scaler.get_scale() == scale / 2
    trainer.scaler.update(1.0)
    trainer.optimizer.zero_grad(set_to_none=True)
    with pytest.raises(UserError, match="step 2: the gradient is not finite"):
        trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters))


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_need_cuda(name: str) -> None:
    with pytest.raises(UserError, match="needs CUDA; use adamw or adamw_8bit"):
        build_optimizer([nn.Parameter(torch.zeros(2))], TrainingConfig(optimizer=name))  # type: ignore[arg-type]


def test_the_same_seed_is_the_same_run_and_another_is_not(whole: TinyRun, tiny: TinyRun) -> None:
    tiny.train()
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    tiny.train("training.seed=4", "validation.every=0")
    assert not same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


def test_the_seed_decides_order_and_initial_weights(tiny: TinyRun) -> None:
    first, again, other = make_trainer(tiny), make_trainer(tiny), make_trainer(tiny, "training.seed=4")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, again.parameters))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters, other.parameters))
    batches = [[t.data.sampler.next_batch() for _ in range(3)] for t in (first, again, other)]
    assert batches[0] == batches[1] != batches[2]


def test_a_normalized_step_is_the_same_however_its_examples_are_dealt(
    tiny: TinyRun, tiny_model: Path, tmp_path: Path
) -> None:
    """Through the run itself: what is drawn, the gradient and what is logged, layers included."""
    ragged = records(count=4)
    for length, record in enumerate(r for r in ragged if r["role"] == "pair"):
        record |= {"unsafe_answer": "Turn it. " * 2**length, "safe_answer": "No, not that. " * 2**length}
    data = write_records(tmp_path / "ragged.jsonl", ragged)
    found = {}
    for normalize in ("step", "micro_batch"):
        for examples, accumulation in ((1, 4), (4, 1)):
            run = TinyRun(tiny_model, tmp_path / f"{normalize}-{examples}")
            dealt = (
                f"training.examples={examples}",
                f"training.accumulation={accumulation}",
                f"training.normalize={normalize}",
            )
            smooth = ("objective.cosine=0", "objective.pair=0.3", "lora.dropout=0", "training.learning_rate=1e-3")
            run.train(*dealt, *smooth, *STEADY, "training.steps=2", f"data.sources={data}")
            found[normalize, examples] = [
                {"loss": r["loss"], "norm": r["grad_norm"], **r["terms"]}
                | {f"{n} {x}": v for n, layers in r["distance_per_layer"].items() for x, v in layers.items()}
                for r in rows(run.path, "step")
            ]
    for row, expected in zip(found["step", 1], found["micro_batch", 4], strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert found["step", 4] == found["micro_batch", 4]
    first, whole = found["micro_batch", 1][0], found["micro_batch", 4][0]
    assert first["pair"] != pytest.approx(whole["pair"], rel=2e-3)
