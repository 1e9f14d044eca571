"""Names that are no file: whether a file was meant, and which one there is."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import os
from pathlib import Path

from repbend_fast.errors import UserError

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".txt")
MODEL_FILES = ("config.json", "adapter_config.json", "state.json", "state.pt")
LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Bytes; what is longer no file system here can hold, and asking for it fails in ways of its own."""
_MOST_NAMES = 10_000
LIKENESS = 0.7


def own_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user named: ``~`` is the home of the user or, where there is one, of ``~NAME``; else it stays.

    Raises:
        UserError: longer than a path can be.
    """
    path = Path(os.path.expanduser(name))
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise UserError(f"{ascii(os.fspath(name))[1:41]}...: is too long for a path")
    return path


def looks_like_file(name: str) -> bool:
    """Whether a name ends as a data file does, or nearly so: a hub name may have a dot too, as in ``org/data-v1.5``."""
    suffix = Path(name).suffix.lower()
    return suffix in DATA_SUFFIXES or (
        len(suffix) > 2 and bool(difflib.get_close_matches(suffix, DATA_SUFFIXES, 1, 0.75))
    )


def is_path(name: str) -> bool:
    """Whether a name can only be a path: hub names have one slash at most and begin with a letter or a digit."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def is_hub_name(name: str) -> bool:
    """Whether a name is one of a data set with its owner, as in ``owner/name``; a bare word may as well be a file."""
    return "/" in name and not is_path(name) and not looks_like_file(name)


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model, an adapter, or the state of a checkpoint in it."""
    return any((folder / name).is_file() for name in MODEL_FILES) or any(folder.glob("*.gguf"))


def package_folder(package: str) -> Path | None:
    """The folder of an installed Python package; None where there is none. It is not imported: a package that only
    carries a model's file may ask for modules that are not installed.
    """
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):  # the parent of a dotted name is missing, or the name is none
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def gguf_files(folder: Path) -> list[str]:
    """The names of the GGUF files in a folder that holds no model of another kind."""
    if any((folder / name).is_file() for name in MODEL_FILES):
        return []
    return sorted(entry.name for entry in folder.glob("*.gguf"))


def names_model(name: str) -> bool:
    """Whether a name is a model's: a folder that holds one and is no run, a GGUF file, ``package:NAME``, or a hub name
    whose first part is no folder here.
    """
    path = own_path(name)
    if path.is_dir():
        return not (path / "config.yaml").is_file() and holds_model(path)
    suffix = path.suffix.lower()
    hub = is_hub_name(name) and suffix not in (".yaml", ".yml") and not path.parent.is_dir()
    return suffix == ".gguf" or name.startswith("package:") or hub


def nearest(name: str) -> str:
    """``; did you mean NAME?`` with the most similar name in the same folder, by its stem first; empty where there is
    none.
    """
    path = own_path(name)
    try:
        names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return ""
    found = max(
        ((_likeness(path.stem, Path(n).stem), _likeness(path.name, n), n) for n in names), default=(0.0, 0.0, "")
    )
    return f"; did you mean {path.parent / found[2]}?" if found[0] >= LIKENESS else ""


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
