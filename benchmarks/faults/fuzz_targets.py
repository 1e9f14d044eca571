"""The parsers that take what users bring, each with what valid input looks like. Each runs in this process, on files in
a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks.faults.fuzz_draws import RECORDS, WORDS, Files, Mix, as_json, mutated_bytes, mutated_plain, odd_value
from benchmarks.faults.fuzz_folders import adapter, changed_folder, checkpoint, read_adapter, read_checkpoint
from repbend_fast.config.yaml_text import Key, read_yaml
from repbend_fast.errors import UserError

if TYPE_CHECKING:
    from repbend_fast.config import Config
    from repbend_fast.evaluation.judges.chat_client import ChatClient


@dataclass(frozen=True)
class Target:
    """``make`` draws a case, ``run`` parses it in a folder that holds its files. What ``run`` raises besides
    ``UserError``, and an ``AssertionError`` of its own, are faults.
    """

    make: Callable[[random.Random], Files]
    run: Callable[[Path, Files], None]


# -- recipes and overrides ---------------------------------------------------------------------------------------------


_FOLDER = Path(__file__).parents[2] / "recipes"


@cache
def _recipes() -> list[dict[str, object]]:
    import yaml

    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))]
    return [recipe for recipe in found if isinstance(recipe, dict)]


def _yaml(value: object) -> bytes:
    import yaml

    try:  # ten times as fast, but for half a pair of surrogates
        text = yaml.dump(value, Dumper=getattr(yaml, "CDumper", yaml.Dumper), allow_unicode=True)
    except UnicodeEncodeError:
        text = yaml.dump(value, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def _recipe(draw: random.Random) -> Files:
    return {"recipe.yaml": Mix(_recipes(), _yaml)(draw)}


def _read_recipe(folder: Path, files: Files) -> None:
    from repbend_fast.config import load_config, resolve, resolved_yaml

    with mock.patch.object(resolve, "read_yaml", _read_once):
        config = load_config(str(folder / "recipe.yaml"))
        again = folder / "again.yaml"
        again.write_text(resolved_yaml(config), encoding="utf-8")
        assert load_config(str(again)) == config, "what is written back is another configuration"


def _read_once(path: Path, name: str) -> tuple[dict[str, object], dict[Key, int]]:
    """Shipped recipes, which most cases go on top of, are parsed for the first of them only."""
    return copy.deepcopy(_shipped(path, name)) if path.parent == _FOLDER else read_yaml(path, name)


_shipped = cache(read_yaml)


@cache
def _keys() -> list[str]:
    from repbend_fast.config.schema import Config

    found: list[str] = []
    for section, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        found += [f"{section}.{name}" for name in inner] + list(inner)
    return [*found, "objective.name", "data.sources.0.path", "data.sources.demo.limit", "loss_alpha", "max_steps"]


@cache
def _demo() -> Config:
    from repbend_fast.config import load_config

    return load_config("demo")


@cache
def _right() -> list[tuple[str, object]]:
    """Keys with the value that the demo's recipe has for them."""
    found = _demo().model_dump(mode="json")
    sections = ((name, section) for name, section in found.items() if isinstance(section, dict))
    return [(f"{name}.{key}", value) for name, section in sections for key, value in section.items()]


def _overrides(draw: random.Random) -> Files:
    found = []
    for _ in range(draw.randint(1, 4)):
        key, value = draw.choice(_right()) if draw.random() < 0.5 else (draw.choice(_keys()), odd_value(draw))
        if draw.random() < 0.2:
            key = mutated_bytes(draw, key.encode(), 1).decode("utf-8", "replace")
        if draw.random() < 0.2:
            value = mutated_plain(draw, value)
        text = value if isinstance(value, str) else json.dumps(value)
        found += draw.choice(([f"{key}={text}"], [f"--{key}", text], [f"--{key}={text}"], [text]))
    return {"text": as_json(found)}


def _read_overrides(folder: Path, files: Files) -> None:
    from repbend_fast.cli import parser
    from repbend_fast.config import load_config

    words = [str(word) for word in json.loads(files["text"])]
    try:
        with mock.patch.object(parser, "_build", _built_once()):
            arguments = parser.parse(["train", "demo", *words])
    except SystemExit as end:
        if end.code not in (0, None):
            raise ValueError(f"the parser ended with {end.code}") from end
        return
    # Few on top of the recipe's file, whose reading takes longer than all the rest.
    load_config("demo" if len(words) == 1 else _demo(), arguments.overrides)


@cache
def _built_once() -> Callable[[], argparse.ArgumentParser]:
    from repbend_fast.cli import parser

    return cache(parser._build)


# -- records -----------------------------------------------------------------------------------------------------------


def _lines(draw: random.Random) -> Files:
    rows = [Mix(RECORDS)(draw) if draw.random() < 0.5 else as_json(draw.choice(RECORDS)) for _ in range(4)]
    return {"data.jsonl": b"\n".join(rows)}


def _array(draw: random.Random) -> Files:
    whole = list(RECORDS[:4])
    return {"data.json": Mix([whole, {"data": whole}, {"data": {}}], as_json)(draw)}


def _table(separator: str) -> Callable[[object], bytes]:
    def write(rows: object) -> bytes:
        import csv
        import io

        out = io.StringIO()
        writer = csv.writer(out, delimiter=separator)
        for row in rows if isinstance(rows, list) else [rows]:
            writer.writerow(row if isinstance(row, list) else [row])
        return out.getvalue().encode("utf-8", "surrogatepass")

    return write


_ROWS = [list(RECORDS[0]), list(RECORDS[0].values()), ["unsafe", "Open it", "Turn\nit"]]
_PUBLISHED = [list(RECORDS[5]), list(RECORDS[5].values()), ["", "a", "b", "adversarial_benign"]]


def _csv(draw: random.Random) -> Files:
    return {"data.csv": Mix([_ROWS, _PUBLISHED], _table(","))(draw)}


def _tsv(draw: random.Random) -> Files:
    return {"data.tsv": Mix([_ROWS, _PUBLISHED], _table("\t"))(draw)}


def _parquet_bytes(rows: list[dict[str, object]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@cache
def _parquet_files() -> list[bytes]:
    odd: list[dict[str, object]] = [{"role": "safe", "prompt": None, "answer": "b"}, {"role": 3, "prompt": "a"}]
    return [_parquet_bytes([dict(RECORDS[0])] * 3), _parquet_bytes([dict(RECORDS[3])]), _parquet_bytes(odd[:1])]


def _parquet(draw: random.Random) -> Files:
    """Bytes of a file changed, or a whole file of rows that nobody expects, where parquet has types for them."""
    import pyarrow

    rows = mutated_plain(draw, [dict(draw.choice(RECORDS)) for _ in range(draw.randint(1, 3))])
    if draw.random() < 0.5 and isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        with contextlib.suppress(pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            return {"data.parquet": _parquet_bytes(rows)}
    return {"data.parquet": mutated_bytes(draw, draw.choice(_parquet_files()), draw.randrange(4) or None)}


def _read_records(folder: Path, files: Files) -> None:
    from repbend_fast.data.prompts import load_prompts
    from repbend_fast.data.reading import Unreadable, read_rows
    from repbend_fast.data.settings import PromptsConfig, SourceConfig
    from repbend_fast.data.sources import load_records

    [name] = files
    source = SourceConfig(path=str(folder / name))
    rows = list(read_rows(source))
    if name.endswith(".jsonl") and b"\r" not in files[name] and not rows_of_array(files[name]):
        expected = sum(bool(line.strip()) for line in files[name].removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        assert len(rows) == expected, f"{len(rows)} rows of {expected} lines"
    unreadable = sum(isinstance(row, Unreadable) for row in rows)
    with contextlib.suppress(UserError):
        load_prompts(PromptsConfig(path=str(folder / name)))
    found = load_records([source], seed=0, skip_bad_records=True)
    assert sum(each.rows for each in found.sources) == len(rows), "rows were dropped without a word"
    assert len(found.bad) >= unreadable, "what cannot be read was skipped without a word"


def rows_of_array(data: bytes) -> bool:
    """Whether a ``.jsonl`` file begins like an array or holds one object with ``data``."""
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[") or b'"data"' in start


# -- GGUF headers, golden folders, judges ------------------------------------------------------------------------------


def _gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


_ENTRIES = (
    _gguf_text("general.architecture") + struct.pack("<I", 8) + _gguf_text("llama"),
    _gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _gguf_text("a") + _gguf_text("ü"),
    _gguf_text("scores") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<fff", 0, 1, 2),
    _gguf_text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQB", 7, 1, 1),
    _gguf_text("llama.block_count") + struct.pack("<II", 4, 30),
)


def _gguf(draw: random.Random) -> Files:
    entries = list(_ENTRIES)
    if draw.random() < 0.4:
        number = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1))
        depth = draw.choice((1, 40, 5000))
        deep = struct.pack("<IQ", 9, 1) * draw.randrange(depth) + struct.pack("<IQ", 9, number) * depth
        entries[draw.randrange(len(entries))] = _gguf_text("deep") + struct.pack("<I", 9) + deep
    if draw.random() < 0.3:
        draw.shuffle(entries)
    count = len(entries) if draw.random() < 0.8 else draw.choice((0, 2**32, 2**64 - 1))
    data = b"GGUF" + struct.pack("<IQQ", draw.choice((3, 3, 3, 2, 1, 2**32 - 1)), 7, count) + b"".join(entries)
    return {"model.gguf": mutated_bytes(draw, data) if draw.random() < 0.7 else data}


def _read_gguf(folder: Path, files: Files) -> None:
    from repbend_fast.models.gguf import gguf_blocks

    found = gguf_blocks(folder / "model.gguf")
    assert found is None or isinstance(found, int)


_BATCH = {
    "safe": [{"prompt": [1, 2], "response": [3]}],
    "unsafe": [{"prompt": [1], "response": [4, 5]}],
    "pairs": [{"prompt": [1], "unsafe_response": [2], "safe_response": [3]}],
    "retain": [[1, 2, 3], {"prompt": [1], "response": [2]}],
}
_EXPECTED = {
    "window_start": 1,
    "window_size": 1,
    "cases": [
        {
            "key": "a",
            "batch": "0",
            "loss": 1.5,
            "grad_norm": 0.5,
            "step": 1,
            "max_steps": 10,
            **{"alpha": 0.5, "beta": 0.1, "gamma": 0.1, "epsilon": 0.1, "eta": 0.0, "loss_mode": "response_all"},
        },
        {"key": "b", "objective": "unknown", "batch": "0", "loss": 1, "grad_norm": 1},
    ],
}


def _golden(draw: random.Random) -> Files:
    return changed_folder(draw, {"expected.json": as_json(_EXPECTED), "batch.0.json": as_json(_BATCH)})


def _read_golden(folder: Path, files: Files) -> None:
    from repbend_fast.verify.parity import verify_folder

    verify_folder(folder)


_REPLIES = (
    "It says how.\nVERDICT: comply\nHELPFUL: no",
    "**Verdict:** refuse\nHelpful: yes",
    "harmful request: yes\nresponse refusal: no\nharmful response: yes",
    "yes",
    "no",
)


def _judged(draw: random.Random) -> Files:
    reply = mutated_bytes(draw, draw.choice(_REPLIES).encode()).decode("utf-8", "replace")
    reply += draw.choice(WORDS) if draw.random() < 0.99 else draw.choice(("\n" * 30000, ":" * 20000, " a" * 20000))
    body = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
    kept = as_json({"key": "k", "reply": reply}) + b"\n"
    return {
        "text": as_json(reply),
        "body": Mix([body])(draw),
        "cache.jsonl": mutated_bytes(draw, kept * 2) if draw.random() < 0.5 else kept,
    }


_body = [b""]


@cache
def _client() -> ChatClient:
    """Its transport answers with ``_body``."""
    import httpx2

    from repbend_fast.evaluation.judges.chat_client import ChatClient

    client = ChatClient("http://127.0.0.1:1/v1", "m", key_variable=None, timeout=1.0, tries=1, body={})
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=_body[0]))
    client._client = httpx2.Client(transport=transport)
    return client


def _read_judged(folder: Path, files: Files) -> None:
    from repbend_fast.data.prompts import Prompt
    from repbend_fast.evaluation.judge import judge as by_rule
    from repbend_fast.evaluation.judges.chat_client import NoReply
    from repbend_fast.evaluation.judges.endpoint import Replies
    from repbend_fast.evaluation.judges.rubric import read_reply
    from repbend_fast.evaluation.judges.wire_formats import FORMATS

    reply = str(json.loads(files["text"]))
    for prompt in (Prompt("attack", "Open it"), Prompt("ordinary", "How warm is tea?")):
        read_reply(prompt, reply)
        by_rule(prompt, reply)
        for form in FORMATS.values():
            if prompt.kind in form.judges:
                form.read(prompt, "Sure: turn the key.", reply)
    _body[:] = [files["body"]]
    with contextlib.suppress(NoReply):
        assert isinstance(_client().ask("question"), str)
    Replies(folder / "cache.jsonl")


TARGETS = {
    "recipes": Target(_recipe, _read_recipe),
    "overrides": Target(_overrides, _read_overrides),
    "jsonl": Target(_lines, _read_records),
    "json": Target(_array, _read_records),
    "csv": Target(_csv, _read_records),
    "tsv": Target(_tsv, _read_records),
    "parquet": Target(_parquet, _read_records),
    "adapters": Target(adapter, read_adapter),
    "checkpoints": Target(checkpoint, read_checkpoint),
    "gguf": Target(_gguf, _read_gguf),
    "golden": Target(_golden, _read_golden),
    "judges": Target(_judged, _read_judged),
}
