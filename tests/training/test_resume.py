"""A run that was interrupted or killed, and resumed, is the run that was not: to the bit on the CPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import TinyRun, adapter_of, reproducible, rows, same_tensors, write_records
from tiny_run import records as make_records

from repbend_fast.cli import main
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import RunFolder, only_writer
from repbend_fast.runs.stored import MANIFEST, write_manifest
from repbend_fast.training.interrupt import Interrupt
from repbend_fast.training.trainer import INTERRUPTED, Trainer


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``interrupt_at(k)``: Ctrl-C arrives during step k."""

    def install(step: int) -> None:
        current: list[Interrupt] = []
        enter, train_step = Interrupt.__enter__, Trainer._train_step

        def entered(self: Interrupt) -> Interrupt:
            current[:] = [self]
            return enter(self)

        def stepped(self: Trainer, *args: object) -> None:
            if self.step + 1 == step:
                current[0]._handle(2)
            train_step(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Interrupt, "__enter__", entered)
        monkeypatch.setattr(Trainer, "_train_step", stepped)

    return install


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_interrupted_and_resumed_equals_uninterrupted(
    step: int, whole: TinyRun, tiny: TinyRun, interrupt_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(step)
    assert tiny.train().exit_code == INTERRUPTED
    assert [p.name for p in (tiny.path / "checkpoints").iterdir() if p.name.endswith(f"{step}")] == [
        f"step-00000{step}"
    ]
    assert f"resume with: repbend-fast train --resume {tiny.path}\n" in capsys.readouterr().out
    assert rows(tiny.path, "event")[-1]["event"] == "interrupted"
    interrupt_at(99)
    assert tiny.resume().exit_code == 0
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


def test_resuming_a_normalized_step(
    tiny: TinyRun, tiny_model: Path, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    """A step's micro-batches are drawn before it runs, and those of the next one while it does: none is lost, none
    comes twice.
    """
    straight = TinyRun(tiny_model, tmp_path / "straight")
    straight.train("training.normalize=step", "training.accumulation=3")
    interrupt_at(3)
    assert tiny.train("training.normalize=step", "training.accumulation=3").exit_code == INTERRUPTED
    interrupt_at(99)
    assert tiny.resume().exit_code == 0
    assert reproducible(tiny.path) == reproducible(straight.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(straight.path))


def test_a_run_goes_on_with_its_own_denominators(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    with pytest.raises(
        UserError, match=r"cannot resume: training\.normalize=step, but the checkpoint was written with micro_batch"
    ):
        tiny.resume("training.normalize=step")


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    checkpoints = tiny.path / "checkpoints"
    shutil.rmtree(checkpoints / "step-000006")
    shutil.rmtree(tiny.path / "adapter")
    lines = (tiny.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    until = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 5)
    (tiny.path / "metrics.jsonl").write_text("".join(lines[: until + 1]) + lines[until + 1][:25], encoding="utf-8")
    half = checkpoints / ".step-000006.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert tiny.resume().exit_code == 0
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    assert not list(checkpoints.glob(".*"))


def test_a_whole_last_line_without_its_end_is_kept_apart(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    shutil.rmtree(tiny.path / "checkpoints" / "step-000006")
    text = (tiny.path / "metrics.jsonl").read_text(encoding="utf-8")
    until = [i for i, line in enumerate(text.splitlines()) if json.loads(line)["step"] <= 4][-1]
    torn = "\n".join(text.splitlines()[: until + 1])
    (tiny.path / "metrics.jsonl").write_text(torn, encoding="utf-8")
    tiny.resume()
    assert reproducible(tiny.path) == reproducible(whole.path)


def test_resuming_a_finished_run_damages_nothing(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    for _ in range(2):
        assert tiny.resume().exit_code == 0
        assert reproducible(tiny.path) == reproducible(whole.path)
        assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


def test_more_steps_go_on_and_stay_in_the_runs_settings(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    assert tiny.resume("training.steps=8").exit_code == 0
    assert [row["step"] for row in rows(tiny.path, "step")] == list(range(1, 9))
    assert reproducible(tiny.path)[:6] == reproducible(whole.path)[:6]
    assert not same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    assert tiny.resume().exit_code == 0
    assert len(rows(tiny.path, "step")) == 8


def test_without_validation_from_here_on_the_last_adapter_is_kept(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    assert tiny.resume("training.steps=8", "validation.every=0").exit_code == 0
    (last,) = tiny.path.glob("checkpoints/step-000008")
    assert same_tensors(load_file(last / "adapter_model.safetensors"), adapter_of(tiny.path))


def test_switching_validation_off_at_the_end_keeps_the_best_adapter(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    kept = adapter_of(whole.path)
    assert tiny.resume("validation.every=0").exit_code == 0
    assert same_tensors(adapter_of(tiny.path), kept)


def test_a_stopped_run_goes_on_without_validation(tiny: TinyRun) -> None:
    assert tiny.train("training.steps=6", "validation.max_kl=1e-12", "validation.patience=1").exit_code == 0
    assert rows(tiny.path, "step")[-1]["step"] < 6
    assert tiny.resume("validation.every=0").exit_code == 0
    assert rows(tiny.path, "step")[-1]["step"] == 6


def test_one_training_at_a_time_in_a_folder(tiny: TinyRun) -> None:
    assert tiny.train("training.steps=2", "validation.every=0").exit_code == 0
    before = sorted(path.name for path in tiny.path.parent.iterdir())
    with only_writer(RunFolder(tiny.path)):
        for again in (tiny.train, tiny.resume):
            with pytest.raises(
                UserError, match=rf"another training is writing to this folder \(process {os.getpid()}\)"
            ):
                again("training.steps=4", "validation.every=0")
    assert sorted(path.name for path in tiny.path.parent.iterdir()) == before
    assert tiny.resume("training.steps=4").exit_code == 0


def test_validation_cannot_begin_in_the_middle(tiny: TinyRun) -> None:
    assert tiny.train("validation.every=0", "training.steps=2").exit_code == 0
    with pytest.raises(UserError, match=r"validation\.every=2: validation cannot be switched on at --resume"):
        tiny.resume("validation.every=2", "training.steps=4")
    assert tiny.resume("training.steps=4").exit_code == 0


def test_a_runs_own_adapter_can_be_the_model(whole: TinyRun, tiny: TinyRun) -> None:
    for command in ("train", "plan"):
        assert main([command, str(tiny.recipe), f"model.name={whole.path / 'adapter'}", "training.steps=2"]) == 0
    assert rows(tiny.path, "validation")[0]["kl"] == 0.0


def test_a_lower_learning_rate_is_taken_when_resuming(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    shutil.rmtree(tiny.path / "checkpoints" / "step-000006")
    tiny.resume("training.learning_rate=1e-4", "training.schedule=constant")
    assert [row["learning_rate"] for row in rows(tiny.path, "step")][4:] == [1e-4, 1e-4]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.seed=4", "training.seed=4"),
        ("training.examples=3", "training.examples=3"),
        ("data.max_answer_tokens=9", "data, tokenizer or token limits differ"),
        ("lora.r=8", "lora.r=8, but the checkpoint was written with 4"),
        ("lora.blocks=[0]", "lora.blocks=[0]"),
        ("training.optimizer=adamw_8bit", "training.optimizer=adamw_8bit"),
        ("model.quantization=nf4", "model.quantization=nf4"),
        (
            "validation.max_new_tokens=5",
            "validation.max_new_tokens=5, but the checkpoint was written with 32; set it back, or validation.every=0",
        ),
        ("validation.sources=[]", "validation.sources=[]"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_refused_before_weights_are_loaded(
    override: str, named: str, whole: TinyRun, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.path, tiny.path)
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda config: pytest.fail("weights were loaded"))
    before = {p: p.read_bytes() for p in tiny.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        tiny.resume(override)
    assert str(error.value).startswith("cannot resume: ")
    assert named in str(error.value)
    assert {p: p.read_bytes() for p in tiny.path.rglob("*") if p.is_file()} == before


def test_validation_that_paused_goes_on_with_what_it_was_measured_on(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    assert tiny.resume("training.steps=8", "validation.every=0", "validation.max_new_tokens=5").exit_code == 0
    with pytest.raises(UserError, match=r"validation\.max_new_tokens=5, but the checkpoint was written with 32"):
        tiny.resume("training.steps=10", "validation.every=2")
    assert tiny.resume("training.steps=10", "validation.every=2", "validation.max_new_tokens=32").exit_code == 0
    assert rows(tiny.path, "validation")[-1]["step"] == 10


def test_another_objective_is_refused_by_name(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    state = tiny.path / "checkpoints" / "step-000006" / "state.json"
    plain = json.loads(state.read_text())
    assert plain["settings"]["objective.name"] == "repbend"
    plain["settings"]["objective.name"] = "npo"
    state.write_text(json.dumps(plain))
    (state.parent / MANIFEST).unlink()
    write_manifest(state.parent, {}, {})
    with pytest.raises(
        UserError, match=r"cannot resume: objective\.name=repbend, but the checkpoint was written with npo; set it back"
    ):
        tiny.resume()


def test_changed_data_is_refused(whole: TinyRun, tiny: TinyRun) -> None:
    shutil.copytree(whole.path, tiny.path)
    changed = make_records()
    changed[0]["answer"] += " Indeed."
    other = write_records(tiny.folder / "other.jsonl", changed)
    with pytest.raises(UserError, match="cannot resume: data, tokenizer or token limits differ"):
        tiny.resume(f"data.sources=[{{path: {other}}}]")


@pytest.mark.parametrize("name", ["state.safetensors", "adapter_model.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["empty", "half", "other", "gone"])
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_goes_on(
    name: str, damage: str, whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.path, tiny.path)
    file = tiny.path / "checkpoints" / "step-000006" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            {
                "empty": b"",
                "half": content[: len(content) // 2],
                "other": b'"text"' if name.endswith("json") else b"PK" * 99,
            }[damage]
        )
    assert tiny.resume().exit_code == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if " is damaged (" in line]
    assert note.startswith(f"note: {file.parent} is damaged ({name} ") or f"({name}: " in note
    assert note.endswith("; the one before it is used")
    assert reproducible(tiny.path) == reproducible(whole.path)


def test_nothing_to_resume(tiny: TinyRun) -> None:
    tiny.path.mkdir()
    (tiny.path / "config.yaml").write_text(tiny.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"no checkpoint to resume from; train without --resume"):
        tiny.resume()
