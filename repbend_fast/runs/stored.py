"""Files of tensors and of JSON in a folder, and the manifest that tells whether they are as they were written."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repbend_fast.errors import UserError, one_line
from repbend_fast.runs.folder import flush

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest and of the files it names."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A file as it was written."""

    sha256: str
    size: int


class Damaged(Exception):
    """A folder is not as its manifest says; the text names the file and what is wrong with it."""


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Stored:
    """Write a safetensors file, hashed while it is written; no copy of all tensors is made.

    Unlike safetensors' own writer this one takes tensors that share memory, as 8-bit optimizers' tables do, and a full
    disk is an ``OSError``.
    """
    kept = {name: Kept(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    return write_in_turn(path, kept, tensors.__getitem__)


@dataclass(frozen=True)
class Kept:
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_in_turn(path: Path, kept: Mapping[str, Kept], tensor: Callable[[str], Tensor]) -> Stored:
    """Write a safetensors file whose tensors are made one after the other: no more than one is there at a time.

    Raises:
        ValueError: a tensor is another than ``kept`` says.
    """
    # Wide elements first keep every tensor aligned.
    names = sorted(kept, key=lambda name: (-kept[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + kept[name].size
        header[name] = {
            "dtype": _DTYPES[kept[name].dtype],
            "shape": list(kept[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        beginning: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for data in itertools.chain(beginning, (_bytes_of(_as_kept(name, kept[name], tensor(name))) for name in names)):
            digest.update(data)
            size += len(data)
            file.write(data)
    return Stored(digest.hexdigest(), size)


def _as_kept(name: str, kept: Kept, tensor: Tensor) -> Tensor:
    if (tensor.dtype, tuple(tensor.shape)) != (kept.dtype, kept.shape):
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} in place of {kept.dtype} {kept.shape}")
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_plain(path: Path, value: object) -> Stored:
    """Write a JSON file."""
    data = json.dumps(value).encode()
    with open(path, "wb") as file:
        file.write(data)
    return Stored(hashlib.sha256(data).hexdigest(), len(data))


def read_plain(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Damaged: it is not one.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path.name} holds no object")
    return found


def write_manifest(folder: Path, known: dict[str, Stored], made_on: Mapping[str, object]) -> None:
    """Have all files of ``folder`` on the disk, then write what they are.

    Args:
        known: what was hashed while it was written; other files are read.
    """
    flush(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        stored = known.get(name) or _stored(path)
        files[name] = {"sha256": stored.sha256, "bytes": stored.size}
    write_plain(folder / MANIFEST, {"format": FORMAT, "made_on": made_on, "files": files})


def checked_manifest(folder: Path) -> dict[str, object]:
    """The manifest of a folder whose files are all as it says.

    Raises:
        Damaged: a file is missing, of another size, or altered.
        UserError: files that cannot be read, or a format of another version.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / "state.pt").is_file():
            raise UserError(
                f"{folder}: written by an earlier version of repbend-fast (state.pt), whose checkpoints this one does "
                "not read; go on with that version, or start a new run in another folder"
            )
        raise Damaged(f"{MANIFEST} is missing")
    try:
        return _checked(folder)
    except PermissionError as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be read ({error.strerror}); make its files readable"
        ) from error
    except OSError as error:
        raise Damaged(f"{Path(error.filename or folder).name}: {error.strerror or error}") from error


def _checked(folder: Path) -> dict[str, object]:
    manifest = read_plain(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("format"), int):
        raise Damaged(f"{MANIFEST} names no files")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder}: written by another version of repbend-fast (format {manifest['format']}; {FORMAT} is read); "
            "start a new run in another folder"
        )
    for name, stored in files.items():
        if not isinstance(stored, dict) or not {"sha256", "bytes"} <= stored.keys() or not _within(name):
            raise Damaged(f"{MANIFEST} does not say what {name} is")
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if (size := path.stat().st_size) != stored["bytes"]:
            raise Damaged(f"{name} has {size} bytes of {stored['bytes']}")
        if _stored(path).sha256 != stored["sha256"]:
            raise Damaged(f"{name} has been altered")
    return manifest


def _within(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _stored(path: Path) -> Stored:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Stored(digest, path.stat().st_size)


def apart(value: object, tensors: dict[str, Tensor], name: str) -> object:
    """``value`` as JSON, its tensors put into ``tensors`` under names that begin with ``name``.

    Keys that are no text and tuples come back as they were.

    Raises:
        TypeError: something that is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"map": [[key, apart(each, tensors, f"{name}/{key}")] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [apart(each, tensors, f"{name}/{index}") for index, each in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: {type(value).__name__} cannot be stored")


def together(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``apart`` was given.

    Raises:
        KeyError, TypeError, ValueError: not what ``apart`` returned.
    """
    if not isinstance(plain, dict):
        return plain
    ((kind, found),) = plain.items()
    if kind == "tensor":
        return tensors[found]
    if kind == "map":
        return {key: together(each, tensors) for key, each in found}
    each_of = [together(each, tensors) for each in found]
    return tuple(each_of) if kind == "tuple" else each_of
