"""A checkpoint is whole or is not there: full disks, kills, torn and altered files, checkpoints of earlier versions."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TinyRun, adapter_of, reproducible, rows, same_tensors

from repbend_fast.cli import main
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import RunFolder, remove_leftovers, write_folder
from repbend_fast.runs.stored import MANIFEST, Damaged, apart, checked_manifest, together, write_tensors
from repbend_fast.step.dropout_keys import MASKS
from repbend_fast.training import checkpoint

ROOT = Path(__file__).parents[2]
PHASES = ("adapter", "state", "manifest", "rename")
KILLS = ("state", "rename", "after")
# One process imports; a fork of it trains in each folder and dies in its phase of the second save.
KILLED = """
import os, sys
from pathlib import Path
from repbend_fast.cli import main
from repbend_fast.runs import folder
from repbend_fast.training import checkpoint

def die(phase):
    def hooked(owner, name, meant, before=True):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            hit = any(meant in str(arg) for arg in args)
            if hit and before:
                os._exit(9)
            real_result = real(*args, **kwargs)
            if hit:
                os._exit(9)
            return real_result
        setattr(owner, name, call)
    {
        "state": lambda: hooked(checkpoint, "write_plain", ".step-000004.tmp"),
        "rename": lambda: hooked(os, "replace", ".step-000004.tmp"),
        "after": lambda: hooked(os, "replace", ".step-000004.tmp", before=False),
    }[phase]()

for recipe, phase in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        die(phase)
        os._exit(main(["train", recipe]))
    print(phase, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def names(run: TinyRun) -> list[str]:
    return [path.name for path in RunFolder(run.path).all_checkpoints()]


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``full_at(phase)``: the second save finds no space there; half of a file is written."""

    def install(phase: str) -> None:
        owner, name = {
            "adapter": (checkpoint, "_write_adapter"),
            "state": (checkpoint, "write_tensors"),
            "manifest": (checkpoint, "write_manifest"),
            "rename": (os, "replace"),
        }[phase]
        real = getattr(owner, name)

        def full(*args: Any, **kwargs: Any) -> Any:
            (target,) = [str(arg) for arg in args if ".step-" in str(arg)] or [""]
            if ".step-000004.tmp" in target:
                if phase != "rename":
                    folder = Path(target) if Path(target).is_dir() else Path(target).parent
                    (folder / "torn").write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, full)

    return install


@pytest.mark.parametrize("phase", PHASES)
def test_a_full_disk_at_each_phase_of_a_save(
    phase: str,
    whole: TinyRun,
    tiny: TinyRun,
    full_at: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_at(phase)
    assert main(["train", str(tiny.recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot save step-000004 to ")
    assert "No space left on device; free some space" in error
    assert error.count("\n") == 1
    assert names(tiny) == ["step-000002"]
    checked_manifest(tiny.path / "checkpoints" / "step-000002")
    monkeypatch.undo()
    assert tiny.resume().exit_code == 0
    assert not list(tiny.path.rglob(".*"))
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_killed_during_a_save(whole: TinyRun, tmp_path: Path) -> None:
    runs = {phase: TinyRun(whole.model, tmp_path / phase) for phase in KILLS}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *(part for phase in KILLS for part in (str(runs[phase].recipe), phase))],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for phase, run in runs.items():
        assert f"{phase} 9\n" in done.stdout, done.stderr
        assert names(run) == ["step-000002"] + (["step-000004"] if phase == "after" else [])
        assert run.resume().exit_code == 0
        assert not list(run.path.rglob(".*"))
        assert reproducible(run.path) == reproducible(whole.path)
        assert same_tensors(adapter_of(run.path), adapter_of(whole.path))


def test_one_altered_bit_is_seen(whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.path, tiny.path)
    last = tiny.path / "checkpoints" / "step-000006"
    file = last / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"step-000006: damaged checkpoint \(state\.safetensors has been altered\)"):
        checkpoint.load_checkpoint_adapter(last, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert tiny.resume().exit_code == 0
    note = f"note: {last} is damaged (state.safetensors has been altered); the one before it is used"
    assert note in capsys.readouterr().out.splitlines()
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


def test_no_intact_checkpoint_is_one_line(whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.path, tiny.path)
    for path in RunFolder(tiny.path).all_checkpoints():
        (path / MANIFEST).unlink()
    assert main(["train", "--resume", str(tiny.path)]) == 2
    error = capsys.readouterr().err
    assert (
        "no checkpoint is intact (step-000006: manifest.json is missing; step-000004: manifest.json is missing)"
        in error
    )
    assert "train again without --resume" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_an_earlier_version_is_one_line(
    whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.path, tiny.path)
    for path in RunFolder(tiny.path).all_checkpoints():
        for name in (MANIFEST, "state.json", "state.safetensors", "adapter_model.safetensors", "adapter_config.json"):
            (path / name).unlink()
        torch.save({}, path / "state.pt")
    for argv in (["train", "--resume", str(tiny.path)], ["eval", str(path)]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "written by an earlier version of repbend-fast (state.pt)" in error
        assert error.count("\n") == 1


def test_rotation_keeps_what_was_just_written(whole: TinyRun, tiny: TinyRun) -> None:
    """A damaged checkpoint of a later step would otherwise count as the newest, and the good one be dropped for it."""
    shutil.copytree(whole.path, tiny.path)
    (tiny.path / "checkpoints" / "step-000006" / "state.json").write_text("{}")
    assert tiny.resume("training.steps=5", "training.keep_checkpoints=1").exit_code == 0
    assert names(tiny) == ["step-000005"]
    checked_manifest(tiny.path / "checkpoints" / "step-000005")
    assert (tiny.path / "checkpoints" / "step-000006.damaged").is_dir()


def test_a_checkpoint_is_an_adapter_and_no_pickle(whole: TinyRun) -> None:
    last = RunFolder(whole.path).latest_checkpoint()
    assert last is not None
    assert {path.suffix for path in last.iterdir()} <= {".json", ".safetensors", ".md"}
    config = (last / "adapter_config.json").read_text(encoding="utf-8")
    assert '"peft_type": "LORA"' in config
    assert load_file(last / "adapter_model.safetensors").keys() == adapter_of(whole.path).keys()


def test_going_on_with_other_threads_is_said(whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.path, tiny.path)
    before = torch.get_num_threads()
    try:
        assert tiny.resume("training.steps=7", f"training.threads={before + 1}").exit_code == 0
    finally:
        torch.set_num_threads(before)
    said = f"the checkpoint is from elsewhere (threads {before} there, {before + 1} here); the run goes on"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_going_on_in_another_dtype_is_said(
    dtype: str, whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card without bfloat16 goes on with what one with it began, and the other way round."""
    shutil.copytree(whole.path, tiny.path)
    assert tiny.resume("training.steps=7", f"model.dtype={dtype}").exit_code == 0
    assert f"from elsewhere (dtype float32 there, {dtype} here); the run goes on" in capsys.readouterr().out
    assert tiny.resume("training.steps=8", "model.dtype=float32").exit_code == 0
    assert f"from elsewhere (dtype {dtype} there, float32 here)" in capsys.readouterr().out
    assert math.isfinite(rows(tiny.path, "step")[-1]["loss"])


def test_other_dropout_masks_from_here_on_are_said(
    whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of before their manifests had a version of the masks are of the first one."""
    shutil.copytree(whole.path, tiny.path)
    assert tiny.resume("training.steps=7").exit_code == 0
    assert "other masks" not in capsys.readouterr().out
    last = tiny.path / "checkpoints" / "step-000007"
    manifest = json.loads((last / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["made_on"].pop("masks") == MASKS
    (last / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert tiny.resume("training.steps=8").exit_code == 0
    said = capsys.readouterr().out
    assert "in which lora.dropout=0.2 drew other masks; the run goes on" in said
    assert "from elsewhere" not in said


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renamings of a replacement, the run would have lost its adapter."""
    run = RunFolder(tmp_path)
    write_folder(run.adapter, lambda folder: (folder / "a").write_text("old") and None)
    os.replace(run.adapter, tmp_path / ".adapter.old")
    remove_leftovers(run)
    assert (run.adapter / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_tensors_and_structure_come_back(tmp_path: Path) -> None:
    table = torch.arange(6.0)
    value = {
        "state": {0: {"step": torch.tensor(3.0), "half": torch.ones(3, dtype=torch.bfloat16)}, 1: {"q": table}},
        "groups": [{"betas": (0.9, 0.1 + 0.2), "params": [0, 1]}],
        "shared": table,
        "turned": table.view(2, 3).t(),
        "none": (torch.empty(0), None, True),
    }
    tensors: dict[str, torch.Tensor] = {}
    plain = apart(value, tensors, "optimizer")
    stored = write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert stored.size == (tmp_path / "a.safetensors").stat().st_size
    assert same_tensors(read, tensors)
    back = together(plain, read)
    assert back["groups"] == value["groups"]
    assert back["state"].keys() == {0, 1}
    assert torch.equal(back["turned"], value["turned"])
    assert isinstance(back["none"], tuple)
    with pytest.raises(TypeError, match="a/b: set cannot be stored"):
        apart({"b": set()}, {}, "a")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "files": {"../a": {"sha256": "", "bytes": 0}}}', "[" * 9999]
)
def test_a_strange_manifest_is_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=r"manifest\.json"):
        checked_manifest(tmp_path)
