"""What planning has measured, kept between calls in the user's cache folder.

The folder is ``REPBEND_CACHE``, else ``repbend-fast`` in ``XDG_CACHE_HOME`` or ``~/.cache``; ``REPBEND_CACHE=off``
keeps nothing.

An entry is one JSON file, named by what it depends on, with a checksum of its value. One that is damaged, or of another
key, counts as missing and is written anew. Files are put in place whole, so writers do not disturb each other, and a
folder that cannot be written only costs the time of measuring again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import repbend_kernels

import repbend_fast
from repbend_fast.nearby import own_path

Json: TypeAlias = "Mapping[str, Json] | list[Json] | str | float | bool | None"

LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel")
MOST_ENTRIES = 500
"""Entries that are kept; of more, those that were written first go."""


def cache_folder() -> Path | None:
    """The folder, which need not be there; None where nothing is kept."""
    chosen = os.environ.get("REPBEND_CACHE", "")
    if chosen:
        return None if chosen == "off" else own_path(chosen)
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "repbend-fast"
    except RuntimeError:  # a user without a home
        return None


def read(kind: str, key: Json) -> Json:
    """What was kept under this key; None if there is nothing, or nothing whole."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        whole = entry["key"] == _plain(key) and entry["checksum"] == _digest(entry["value"])
        return entry["value"] if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write(kind: str, key: Json, value: Json) -> bool:
    """Keep a value in the place of what was there; whether that worked."""
    path = _path(kind, key)
    if path is None:
        return False
    entry = {"key": _plain(key), "value": value, "checksum": _digest(value)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
            temporary = Path(file.name)
            json.dump(entry, file)
        os.replace(temporary, path)
        _forget_oldest(path.parent)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return False
    return True


@cache
def versions() -> Mapping[str, Json]:
    """What any measurement depends on: the libraries' versions, and this project's code itself."""
    return {**{name: _version(name) for name in LIBRARIES}, "code": _code()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _code() -> str:
    digest = hashlib.sha256()
    for package in (repbend_fast, repbend_kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _path(kind: str, key: Json) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"{kind}-{_digest(_plain(key))[:32]}.json"


def _plain(key: Json) -> Json:
    """As JSON gives it back."""
    plain: Json = json.loads(json.dumps(key, sort_keys=True))
    return plain


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in entries[: max(0, len(entries) - MOST_ENTRIES)]:
        path.unlink(missing_ok=True)
