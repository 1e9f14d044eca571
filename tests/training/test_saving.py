"""A full or read-only disk gives one line and exit code 2; what was saved before stays whole, and nothing half-written
is left.
"""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import TinyRun, reproducible, same_tensors

from repbend_fast.cli import main
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import RunFolder, only_writer, start_folder, write_folder, write_json, write_text
from repbend_fast.runs.metrics import MetricsLog
from repbend_fast.runs.stored import checked_manifest
from repbend_fast.training.checkpoint import adapter_weights

Limit = Callable[[str], None]


@pytest.fixture
def disk_full_at(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """``disk_full_at(name)``: from the third time on, opening or writing a path with ``name`` in it finds no space."""

    def install(name: str) -> None:
        seen: list[str] = []
        real_open, real_save = builtins.open, save_file

        def check(path: Any) -> None:
            if name in str(path):
                seen.append(str(path))
                if len(seen) > 2:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        def full_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode[0] in "wa":
                check(path)
            return real_open(path, mode, *args, **kwargs)

        def full_save(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            check(path)
            real_save(tensors, path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", full_open)
        monkeypatch.setattr("peft.peft_model.safe_save_file", full_save)

    return install


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("state.safetensors", "step-000006"),
        (".adapter.tmp/adapter_model", "adapter"),
        ("metrics.jsonl", "metrics.jsonl"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(
    name: str,
    saved: str,
    tiny: TinyRun,
    disk_full_at: Limit,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context():
        disk_full_at(name)
        assert main(["train", str(tiny.recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot save {saved} to ")
    assert "No space left on device; free some space" in error
    assert error.count("\n") == 1
    assert not list(tiny.path.rglob(".*"))
    for checkpoint in RunFolder(tiny.path).all_checkpoints():
        checked_manifest(checkpoint)
    monkeypatch.undo()
    if name == "state.safetensors":
        assert [p.name for p in RunFolder(tiny.path).all_checkpoints()] == ["step-000002", "step-000004"]
    if name != "metrics.jsonl":
        assert load_file(tiny.path / "adapter" / "adapter_model.safetensors")
        assert tiny.resume().exit_code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if (
        not mounted
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("writer", ["torch", "safetensors", "text"])
def test_a_disk_that_is_really_full(writer: str, small_disk: Path) -> None:
    big = {"a": torch.zeros(100_000)}
    folder = small_disk / "saved"
    write_folder(folder, lambda path: (path / "good").write_text("good", encoding="utf-8") and None)

    def fill(path: Path) -> None:
        {
            "torch": lambda: torch.save(big, path / "a.pt"),
            "safetensors": lambda: save_file(big, path / "a.safetensors"),
            "text": lambda: (path / "a.txt").write_text("a" * 400_000, encoding="utf-8"),
        }[writer]()

    with pytest.raises(UserError, match=r"cannot save saved to .*: No space left on device; free some space"):
        write_folder(folder, fill)
    assert [p.name for p in small_disk.rglob("*")] == ["saved", "good"]
    with pytest.raises(UserError, match=r"cannot save text\.txt to .*: No space left on device"):
        write_text(small_disk / "text.txt", "a" * 400_000)
    assert [p.name for p in small_disk.iterdir()] == ["saved"]


def test_a_run_on_a_disk_that_fills_up(small_disk: Path, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_disk / "run"
    assert (
        main(["train", str(tiny.recipe), f"output.folder={folder}", "training.keep_checkpoints=9", "training.steps=8"])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: cannot save ")
    assert "No space left on device" in error
    checkpoints = RunFolder(folder).all_checkpoints()
    assert len(checkpoints) >= 1
    assert not list(folder.rglob(".*"))
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(["train", "--resume", str(folder)]) == 0
    assert main(["train", str(tiny.recipe), f"output.folder={tiny.path}", "training.steps=8"]) == 0
    assert reproducible(folder) == reproducible(tiny.path)


def test_a_read_only_folder_is_refused_before_weights_are_loaded(
    small_disk: Path, tiny: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda config: pytest.fail("weights were loaded"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", str(tiny.recipe), f"output.folder={small_disk / 'deep' / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{small_disk} is not a folder that can be written to" in error


def test_a_folder_that_becomes_read_only(small_disk: Path, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(["train", str(tiny.recipe), f"output.folder={folder}", "training.steps=2"]) == 0
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", "--resume", str(folder), "training.steps=4"]) == 2
    error = capsys.readouterr().err
    assert "Read-only file system; make the folder writable" in error
    assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


def test_a_failing_replacement_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, lambda path: (path / "a").write_text("old", encoding="utf-8") and None)
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(folder, lambda path: (path / "a").write_text("new", encoding="utf-8") and None)
    assert (folder / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_temporary_folder_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with (
        pytest.raises(UserError, match=r"temporary folder cannot be written to .*; set TMPDIR"),
        only_writer(RunFolder(tmp_path)),
    ):
        pass


def test_the_lock_of_a_folder_is_gone_with_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the work failed, so that the temporary folder does not fill up."""
    pytest.importorskip("fcntl")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = RunFolder(tmp_path / "run")
    with suppress(ZeroDivisionError), only_writer(run):
        (lock,) = tmp_path.iterdir()
        assert lock.read_text(encoding="utf-8") == str(os.getpid())
        with pytest.raises(UserError, match=f"another training .*process {os.getpid()}"), only_writer(run):
            pass
        assert lock.is_file()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_taken_away_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the one who held it is done and removes it, and a third one makes it anew."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with only_writer(RunFolder(tmp_path / "run")):
        (held,) = tmp_path.iterdir()
        held.unlink()
        held.write_text("another's", encoding="utf-8")
    assert held.read_text(encoding="utf-8") == "another's"
    held.unlink()
    lock, others = fcntl.flock, ExitStack()

    def flock(file: TextIO, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        Path(file.name).unlink()
        others.enter_context(only_writer(RunFolder(tmp_path / "run")))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = only_writer(RunFolder(tmp_path / "run"))
    with others, pytest.raises(UserError, match="another training is writing"), second:
        pass
    with only_writer(RunFolder(tmp_path / "run")):
        assert len(list(tmp_path.iterdir())) == 1


def test_earlier_runs_are_moved_and_numbered(tiny: TinyRun) -> None:
    for seed in (1, 2, 3):
        tiny.train(f"training.seed={seed}", "training.steps=2")
    first, second = tiny.folder / "run.1", tiny.folder / "run.2"
    assert "seed: 1" in (first / "config.yaml").read_text(encoding="utf-8")
    assert "seed: 2" in (second / "config.yaml").read_text(encoding="utf-8")
    assert "seed: 3" in (tiny.path / "config.yaml").read_text(encoding="utf-8")
    assert all((path / "adapter" / "adapter_model.safetensors").is_file() for path in (first, second, tiny.path))


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="holds no run; choose another folder"):
        start_folder(RunFolder(folder))
    assert (folder / "chapter").read_text(encoding="utf-8") == "text"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert start_folder(RunFolder(empty)) is None


def test_only_the_newest_checkpoints_are_kept(tiny: TinyRun) -> None:
    tiny.train("training.checkpoint_every=1", "training.keep_checkpoints=3", "validation.every=0")
    assert [p.name for p in RunFolder(tiny.path).all_checkpoints()] == ["step-000004", "step-000005", "step-000006"]


def test_saving_other_weights_leaves_the_models_own(tiny: TinyRun) -> None:
    from repbend_fast.models import attach_lora, load_model

    config = tiny.config()
    model = attach_lora(load_model(config.model), config.lora, config.objective.window)
    own = adapter_weights(model)
    other = {name: torch.ones_like(weight) for name, weight in own.items()}
    from repbend_fast.training.checkpoint import save_adapter

    save_adapter(model, tiny.folder / "adapter", other)
    saved = load_file(tiny.folder / "adapter" / "adapter_model.safetensors")
    assert all(bool((weight == 1).all()) for weight in saved.values())
    assert same_tensors(adapter_weights(model), own)


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": [None, 1.5], "b": {"c": None}}
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write("step", 1, loss=math.inf, terms={"kl": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text(encoding="utf-8")) == {
        "type": "step",
        "step": 1,
        "loss": None,
        "terms": {"kl": None},
    }
