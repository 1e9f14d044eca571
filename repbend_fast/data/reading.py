"""Rows of a source, one at a time, from a local file or from the hub.

A row is a dict of fields with its origin; what cannot be read as one is a ``BadRecord`` and reading goes on after it.
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
from typing import IO, Any

from repbend_fast.data.records import BadRecord
from repbend_fast.data.settings import SourceConfig
from repbend_fast.errors import UserError, one_line
from repbend_fast.nearby import looks_like_file, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BOM = b"\xef\xbb\xbf"
_CSV_FIELD_LIMIT = 1 << 27


@dataclass(frozen=True, slots=True)
class Row:
    """One row's fields and where it stands."""

    origin: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class HubDefaults:
    """What ``load_dataset`` needs for a known data set when the source does not say."""

    subset: str | None = None
    split: str = "train"
    options: tuple[tuple[str, Any], ...] = ()


HUB_DEFAULTS = {
    "wildguardmix": HubDefaults(subset="wildguardtrain"),
    # The official card reads the TSV so: without it an empty cell becomes a missing value.
    "wildjailbreak": HubDefaults(subset="train", options=(("delimiter", "\t"), ("keep_default_na", False))),
    "ultrachat_200k": HubDefaults(split="train_sft"),
}


def read_rows(source: SourceConfig) -> Iterator[Row | BadRecord]:
    """Rows of ``source`` in order. Raises ``UserError`` when it is not there, cannot be opened, or is of no known kind."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if source.split or source.subset:
            raise UserError(f"{source.path}: split and subset belong to hub data sets and folders, not to a file; remove them")
        reader = _reader_for(path)
        try:
            yield from reader(path, source.path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source.path}: cannot be read ({_brief(error)}); check the file or fetch it again") from error
    elif path.is_dir() or (_HUB_NAME.fullmatch(source.path) and not looks_like_file(source.path)):
        yield from _hub_rows(source)
    else:
        raise UserError(
            f"{source.path}: no such file; data.sources.path takes a local file, a hub name such as `owner/name`, or `demo`"
            f"{nearest(source.path)}"
        )


def _reader_for(path: Path) -> Callable[[Path, str], Iterator[Row | BadRecord]]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".json", ".jsonl"):
        return _json_rows
    if suffix in (".csv", ".tsv"):
        return _table_rows
    if suffix == ".parquet" and path.suffix != ".gz":
        return _parquet_rows
    raise UserError(f"{path.name}: unknown kind of file; expected {', '.join(SUFFIXES)}, all but parquet also with .gz")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json_rows(path: Path, name: str) -> Iterator[Row | BadRecord]:
    """One object per line, or one array of objects: files of either name hold either form in the wild."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    return _array_rows(path, name) if start.startswith(b"[") else _line_rows(path, name)


def _line_rows(path: Path, name: str) -> Iterator[Row | BadRecord]:
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
                yield BadRecord(origin, f"invalid UTF-8 (byte {error.start + 1} of the line)")
            except (ValueError, RecursionError) as error:
                yield BadRecord(origin, f"invalid JSON ({_brief(error)})")
            else:
                yield _as_row(origin, value)


def _array_rows(path: Path, name: str) -> Iterator[Row | BadRecord]:
    """Elements are decoded one by one from the text, so that each has its line and the whole is never held as objects."""
    with _open(path) as file:
        text = file.read().removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    place = space.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        origin = f"{name}:{line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield BadRecord(origin, f"invalid JSON ({_brief(error)}); nothing after it can be read")
            return
        if _encodable(text[place:end]):
            yield _as_row(origin, value)
        else:
            yield BadRecord(origin, "invalid UTF-8")
        place = space.match(text, end).end()  # type: ignore[union-attr]
        if text.startswith(",", place):
            place = space.match(text, place + 1).end()  # type: ignore[union-attr]
        elif not text.startswith("]", place):
            line += text.count("\n", counted, place)
            yield BadRecord(f"{name}:{line}", "invalid JSON (expected `,` or `]`); nothing after it can be read")
            return


def _table_rows(path: Path, name: str) -> Iterator[Row | BadRecord]:
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
                yield BadRecord(origin, f"invalid quoting ({_brief(error)})")
                continue
            if header is None:
                header = [cell.removeprefix("\ufeff") for cell in cells]
            elif cells and len(cells) != len(header):
                yield BadRecord(origin, f"{len(cells)} cells, but the header has {len(header)}")
            elif cells and not all(map(_encodable, cells)):
                yield BadRecord(origin, "invalid UTF-8")
            elif cells:
                yield Row(origin, dict(zip(header, cells)))


def _parquet_rows(path: Path, name: str) -> Iterator[Row | BadRecord]:
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
                    yield BadRecord(f"{name}:{number}", "invalid UTF-8")
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a readable parquet file ({_brief(error)}); fetch it again") from error


def _hub_rows(source: SourceConfig) -> Iterator[Row | BadRecord]:
    import datasets

    known = HUB_DEFAULTS.get(source.path.rstrip("/").rpartition("/")[2].lower(), HubDefaults())
    try:
        rows = datasets.load_dataset(source.path, source.subset or known.subset, split=source.split or known.split, **dict(known.options))
    except Exception as error:  # whatever the library raises here (network, access, name, split) is the user's to mend
        raise UserError(
            f"data set {source.path}: cannot be loaded through the hub ({type(error).__name__}: {_brief(error)}); check name, subset, "
            "split, network and access (`hf auth login`), or download it and give the local file as data.sources.path"
            f"{'' if Path(source.path).exists() else nearest(source.path)}"
        ) from error
    for number, fields in enumerate(rows, 1):
        yield _as_row(f"{source.path}:{number}", fields)


def _as_row(origin: str, value: Any) -> Row | BadRecord:
    if isinstance(value, dict):
        return Row(origin, value)
    return BadRecord(origin, f"a record must be a JSON object, not {type(value).__name__}")


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
