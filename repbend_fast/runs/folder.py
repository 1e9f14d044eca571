"""The folder of a run, and writing into it so that a crash or a full disk never damages what is there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NoReturn, TextIO

from repbend_fast.console import outliving_readers
from repbend_fast.errors import UserError, one_line

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# "unexpected pos" is what torch's zip writer says when the disk takes less than it was given.
_NO_SPACE = re.compile(r"no space left|os error 28|file write failed|inline_container.*unexpected pos", re.IGNORECASE)


class RunFolder:
    """Names of everything in one run's folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The run's result: the best adapter in PEFT format."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def units(self) -> Path:
        """With distances in units of the reference: the length that counts as 1, by hidden state."""
        return self.path / "units.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Incomplete ones never carry this name."""
        found = self.all_checkpoints()
        return found[-1] if found else None

    def all_checkpoints(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        found = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(found, key=lambda path: int(path.name[5:]))


@contextmanager
def only_writer(run: RunFolder, what: str = "training", remedy: str = "choose another output.folder") -> Iterator[None]:
    """Hold the run's folder for this process: two trainings in one folder would write into each other's checkpoints and
    log.

    The lock is a file of the machine's temporary folder, since the run's own may be renamed; other machines do not see
    it. What holds a folder works for long, and goes on when nobody reads what it says.

    Args:
        what: kind of work, for the message to whoever comes second.
        remedy: what they can do but wait.

    Raises:
        UserError: another process writes to this folder, or the temporary folder cannot be written to.
    """
    if fcntl is None:
        with outliving_readers():
            yield
        return
    name = hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"repbend-fast-{os.getuid()}-{name}.lock"
    with _locked(path, f"{run.path}: another {what} is writing to this folder", remedy) as file, outliving_readers():
        with suppress(OSError):  # a full disk: the lock holds without a number
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@contextmanager
def _locked(path: Path, taken: str, remedy: str) -> Iterator[TextIO]:
    """The file at ``path``, locked, and gone afterwards."""
    while True:
        with _lock_file(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise UserError(
                    f"{taken} (process {file.read().strip() or 'unknown'}); wait for it, or {remedy}"
                ) from error
            if not _is_at(path, file):
                continue  # whoever had locked it took it away after it was opened here
            try:
                yield file
            finally:
                with suppress(OSError):
                    if _is_at(path, file):  # else somebody took it away, and what lies there is another's
                        path.unlink()
            return


def _lock_file(path: Path) -> TextIO:
    try:
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the temporary folder cannot be written to ({one_line(error)}); set TMPDIR to one that can"
        ) from error


def _is_at(path: Path, file: TextIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


@contextmanager
def saving(what: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error while writing into one clear line.

    Raises:
        UserError: no space left, no permission, or another error of the file system; earlier files are untouched.
    """
    try:
        yield
    except OSError as error:
        _raise_disk_error(what, path, error)
    except Exception as error:
        # safetensors and torch wrap the operating system's error in one of their own.
        if not _NO_SPACE.search(str(error)) and type(error).__name__ != "SafetensorError":
            raise
        number = errno.ENOSPC if _NO_SPACE.search(str(error)) else errno.EIO
        _raise_disk_error(what, path, OSError(number, os.strerror(number) if number == errno.ENOSPC else str(error)))


def _raise_disk_error(what: str, path: Path, error: OSError) -> NoReturn:
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
    if error.errno == errno.EBUSY:
        remedy = "name a folder inside of this one, where a file system is mounted,"
    raise UserError(
        f"cannot save {what} to {path}: {error.strerror or error}; {remedy} and go on, what was saved before is intact"
    ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with saving(path.name, path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """``value`` with null for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then give it its own: a half-written folder never carries the final name.

    An existing folder is moved aside first and deleted only when the new one is in place.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with saving(path.name, path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            first = not path.parent.exists()
            temporary.mkdir(parents=True)
            fill(temporary)
            flush(temporary)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            flush_names(path.parent)
            if first:
                flush_names(path.parent.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def flush(folder: Path) -> None:
    """Have the files on the disk before their folder gets its name: a power cut must not leave a named, empty
    checkpoint.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            flush_names(path)
    flush_names(folder)


def flush_names(folder: Path) -> None:
    """Have the names in a folder on the disk: a renaming is only safe with them."""
    if os.name == "nt":
        return  # which opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that flushes no folders
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(run: RunFolder) -> None:
    """Delete what a killed run was writing: half-written checkpoints can be as large as whole ones.

    A folder that was moved aside for a new one that never came gets its name back.
    """
    for folder in (run.path, run.checkpoints):
        for path in folder.glob(".*.old"):
            if (named := path.with_name(path.name[1 : -len(".old")])).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.replace(path, named)
        for path in folder.glob(".*.tmp"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_folder(run: RunFolder) -> None:
    """What ``start_folder`` would refuse, asked before the expensive part of a run.

    Raises:
        UserError: the folder holds something that is not a run, or cannot be written to.
    """
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())) and not run.config.is_file():
        raise UserError(f"output.folder={run.path}: exists and holds no run; choose another folder")
    there = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output.folder={run.path}: {there} is not a folder that can be written to; choose another folder"
        )


def check_new(folder: Path) -> None:
    """Refuse to write into a folder that something else is in.

    Raises:
        UserError: ``folder`` is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; choose another")
    if folder.is_mount():
        raise UserError(f"{folder}: a file system is mounted here, so that it cannot be renamed; name a folder in it")


def start_folder(run: RunFolder) -> Path | None:
    """Make the folder of a new run. An earlier run in it is moved to the next free ``NAME.1``, ``NAME.2``, …, and that
    is returned.

    Raises:
        UserError: the folder holds something that is not a run, or cannot be made.
    """
    moved = None
    with saving("the run", run.path):
        check_folder(run)
        if run.path.exists() and any(run.path.iterdir()):
            numbered = (run.path.with_name(f"{run.path.name}.{n}") for n in count(1))
            moved = next(path for path in numbered if not path.exists())
            os.replace(run.path, moved)
        run.path.mkdir(parents=True, exist_ok=True)
    return moved
