"""Rows of a source, one at a time, from a local file or from the hub: the one reader, of records and of prompts.

A row is a dict of fields with its origin; what cannot be read as one is an ``Unreadable`` and reading goes on after it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from repbend_fast.data.records import BadRecord
from repbend_fast.data.settings import SourceConfig
from repbend_fast.errors import UserError, one_line
from repbend_fast.nearby import looks_like_file, nearest, own_path

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BOM = b"\xef\xbb\xbf"
_CSV_FIELD_LIMIT = 1 << 27


@dataclass(frozen=True, slots=True)
class Row:
    """One row's fields and where it stands. ``entry``: its number in an array, from 1 on; 0 where rows have lines of
    their own.
    """

    origin: str
    fields: dict[str, object]
    entry: int = 0


@dataclass(frozen=True, slots=True)
class Unreadable(BadRecord):
    """What is no row, of which kind, and where: ``entry`` as in :class:`Row`. ``missing``: cells that the header has
    more than the row.
    """

    kind: Literal["json", "utf8", "quoting", "cells", "object"] = "json"
    entry: int = 0
    missing: int = 0


@dataclass(frozen=True)
class HubDefaults:
    """What ``load_dataset`` needs for a known data set when the source does not say."""

    subset: str | None = None
    split: str = "train"
    options: tuple[tuple[str, object], ...] = ()


HUB_DEFAULTS = {
    "wildguardmix": HubDefaults(subset="wildguardtrain"),
    # The official card reads the TSV so: without it an empty cell becomes a missing value.
    "wildjailbreak": HubDefaults(subset="train", options=(("delimiter", "\t"), ("keep_default_na", False))),
    "ultrachat_200k": HubDefaults(split="train_sft"),
}


def read_rows(source: SourceConfig) -> Iterator[Row | Unreadable]:
    """Rows of ``source`` in order. Raises ``UserError`` when it is not there, cannot be opened, or is of no
    known kind.
    """
    path = own_path(source.path)
    if path.is_file():
        if source.split or source.subset:
            raise UserError(
                f"{source.path}: split and subset belong to hub data sets and folders, not to a file; remove them"
            )
        reader = _reader_for(path)
        try:
            yield from reader(path, source.path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{source.path}: cannot be read ({_brief(error)}); check the file or fetch it again"
            ) from error
    elif path.is_dir() or (_HUB_NAME.fullmatch(source.path) and not looks_like_file(source.path)):
        yield from _hub_rows(source)
    else:
        raise UserError(
            f"{source.path}: no such file; data.sources.path takes a local file, a hub name such as `owner/name`, or "
            "`demo`"
            f"{nearest(source.path)}"
        )


def _reader_for(path: Path) -> Callable[[Path, str], Iterator[Row | Unreadable]]:
    packed = path.suffix.lower() == ".gz"
    suffix = (Path(path.stem).suffix if packed else path.suffix).lower()
    if suffix in (".json", ".jsonl"):
        return _json_rows
    if suffix in (".csv", ".tsv"):
        return _table_rows
    if suffix == ".parquet" and not packed:
        return _parquet_rows
    raise UserError(f"{path.name}: unknown kind of file; expected {', '.join(SUFFIXES)}, all but parquet also with .gz")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json_rows(path: Path, name: str) -> Iterator[Row | Unreadable]:
    """One object per line, or one array of objects, by itself or as the ``data`` of one object: files of either name
    hold any of them.
    """
    with _open(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return _array_rows(path, name)
    data = _data_of(path) if start.startswith(b"{") else None
    if data is None:
        return _line_rows(path, name)
    return (_as_row(f"{name}: entry {entry}", value, entry) for entry, value in enumerate(data, 1))


def _data_of(path: Path) -> list[object] | None:
    """The array under ``data`` of a file that holds one object with that key. A file of lines is not read beyond its
    first.
    """
    with _open(path) as file:
        text = file.readline()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            text += file.read()
        else:
            return _listed(value) if not file.read(4096).strip() else None
    try:
        return _listed(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _listed(value: object) -> list[object] | None:
    found = value.get("data") if isinstance(value, dict) else None
    return found if isinstance(found, list) else None


def _line_rows(path: Path, name: str) -> Iterator[Row | Unreadable]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            origin = f"{name}:{number}"
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Unreadable(origin, f"invalid UTF-8 (byte {error.start + 1} of the line)", "utf8")
            except (ValueError, RecursionError) as error:
                yield Unreadable(origin, f"invalid JSON ({_brief(error)})")
            else:
                yield _as_row(origin, value)


def _array_rows(path: Path, name: str) -> Iterator[Row | Unreadable]:
    """Elements are decoded one by one from the text, so that each has its line and the whole is never held
    as objects.
    """
    with _open(path) as file:
        text = file.read().removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    place = space.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    line, counted, entry = 1, 0, 0
    while not text.startswith("]", place):
        entry += 1
        line, counted = line + text.count("\n", counted, place), place
        origin = f"{name}:{line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield Unreadable(origin, f"invalid JSON ({_brief(error)}); nothing after it can be read", entry=entry)
            return
        if _encodable(text[place:end]):
            yield _as_row(origin, value, entry)
        else:
            yield Unreadable(origin, "invalid UTF-8", "utf8", entry)
        place = space.match(text, end).end()  # type: ignore[union-attr]
        if text.startswith(",", place):
            place = space.match(text, place + 1).end()  # type: ignore[union-attr]
        elif not text.startswith("]", place):
            line += text.count("\n", counted, place)
            yield Unreadable(
                f"{name}:{line}", "invalid JSON (expected `,` or `]`); nothing after it can be read", entry=entry
            )
            return


def _table_rows(path: Path, name: str) -> Iterator[Row | Unreadable]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with _open(path) as file:
        lines = (line.decode("utf-8", errors="surrogateescape") for line in file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            origin = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Unreadable(origin, f"invalid quoting ({_brief(error)})", "quoting")
                continue
            if header is None:
                header = [cell.removeprefix("\ufeff") for cell in cells]
            elif cells and len(cells) != len(header):
                wrong = f"{len(cells)} cells, but the header has {len(header)}"
                yield Unreadable(origin, wrong, "cells", missing=len(header) - len(cells))
            elif cells and not all(map(_encodable, cells)):
                yield Unreadable(origin, "invalid UTF-8", "utf8")
            elif cells:
                yield Row(origin, dict(zip(header, cells)))


def _parquet_rows(path: Path, name: str) -> Iterator[Row | Unreadable]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield Row(f"{name}:{number}", batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError:
                    yield Unreadable(f"{name}:{number}", "invalid UTF-8", "utf8")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter from names of columns
        raise UserError(f"{name}: not a readable parquet file ({_brief(error)}); fetch it again") from error


def _hub_rows(source: SourceConfig) -> Iterator[Row | Unreadable]:
    import datasets

    known = HUB_DEFAULTS.get(source.path.rstrip("/").rpartition("/")[2].lower(), HubDefaults())
    try:
        rows = datasets.load_dataset(
            source.path, source.subset or known.subset, split=source.split or known.split, **dict(known.options)
        )
    except Exception as error:  # whatever the library raises here (network, access, name, split) is the user's to mend
        raise UserError(
            f"data set {source.path}: cannot be loaded through the hub ({type(error).__name__}: {_brief(error)}); "
            "check name, subset, "
            "split, network and access (`hf auth login`), or download it and give the local file as data.sources.path"
            f"{'' if Path(source.path).exists() else nearest(source.path)}"
        ) from error
    for number, fields in enumerate(rows, 1):
        yield _as_row(f"{source.path}:{number}", fields)


def _as_row(origin: str, value: object, entry: int = 0) -> Row | Unreadable:
    if isinstance(value, dict):
        return Row(origin, value, entry)
    return Unreadable(origin, f"a record must be a JSON object, not {type(value).__name__}", "object", entry)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _brief(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return one_line(error)
