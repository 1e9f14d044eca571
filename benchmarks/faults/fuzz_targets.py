"""The parsers that take what users bring, each with what valid input looks like. Each runs in this process, on files in
a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, cast
from unittest import mock

from benchmarks.faults.fuzz_draws import RECORDS, WORDS, Files, Mix, as_json, mutated_bytes, mutated_plain, odd_value
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


@cache
def _recipes() -> list[dict[str, object]]:
    import yaml

    folder = Path(__file__).parents[2] / "recipes"
    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))]
    return [recipe for recipe in found if isinstance(recipe, dict)]


def _yaml(value: object) -> bytes:
    import yaml

    text = yaml.dump(value, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def _recipe(draw: random.Random) -> Files:
    return {"recipe.yaml": Mix(_recipes(), _yaml)(draw)}


def _read_recipe(folder: Path, files: Files) -> None:
    from repbend_fast.config import load_config, resolved_yaml

    config = load_config(str(folder / "recipe.yaml"))
    again = folder / "again.yaml"
    again.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(str(again)) == config, "what is written back is another configuration"


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


# -- folders -----------------------------------------------------------------------------------------------------------


def _files_of(folder: Path, names: tuple[str, ...] = ("*",)) -> Files:
    found = sorted(path for name in names for path in folder.glob(name) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _changed_folder(draw: random.Random, valid: Mapping[str, bytes]) -> Files:
    """One or two files of a folder missing, changed as JSON, or as bytes."""
    files = dict(valid)
    for name in draw.sample(sorted(files), draw.choice((1, 1, 2))):
        if draw.random() < 0.1:
            del files[name]
        elif name.endswith(".json") and draw.random() < 0.7:
            files[name] = as_json(mutated_plain(draw, json.loads(files[name])))
        elif name.endswith(".safetensors") and draw.random() < 0.6:
            files[name] = _changed_header(draw, files[name])
        else:
            files[name] = mutated_bytes(draw, files[name])
    return files


def _changed_header(draw: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = as_json(mutated_plain(draw, json.loads(data[8 : 8 + length])))
    said = len(header) if draw.random() < 0.8 else draw.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", said) + header + data[8 + length :]


class Kit:
    """A tiny model with an adapter, made once: what folders hold, and what they are put on."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from repbend_fast.config import load_config
        from repbend_fast.config.schema import LoraConfig
        from repbend_fast.models import attach_lora
        from repbend_fast.models.causal import CausalLM
        from repbend_fast.runs.folder import RunFolder
        from repbend_fast.training.checkpoint import TrainingState, fixed_settings, save_checkpoint

        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        self.base = cast(CausalLM, LlamaForCausalLM(shape).requires_grad_(False))
        base = copy.deepcopy(self.base)
        self.config = load_config("demo", ["lora.r=2", "lora.target_modules=[q_proj,v_proj]", "model.device=cpu"])
        self.model = attach_lora(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), (1,))
        state = TrainingState(
            step=2,
            sampler={"seed": 0, "places": {}},
            guard={"before": None},
            stopped=None,
            settings=fixed_settings(self.config),
            limits={},
            optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
            scaler={},
            best=None,
            units={1: 2.0},
        )
        self.folder = Path(mkdtemp(prefix="repbend-fuzz-kit-"))
        path = save_checkpoint(RunFolder(self.folder), state, self.model, keep=1)
        self.checkpoint = _files_of(path)
        self.adapter = {name: data for name, data in self.checkpoint.items() if name.startswith("adapter_")}
        shutil.rmtree(self.folder)


kit = cache(Kit)


def _adapter(draw: random.Random) -> Files:
    return _changed_folder(draw, kit().adapter)


def _read_adapter(folder: Path, files: Files) -> None:
    from repbend_fast.exports.low_rank import LowRanks, NotPlainError
    from repbend_fast.models.merge import put_adapter

    with contextlib.suppress(NotPlainError):  # the export then loads the model and says what is wrong
        found = LowRanks(folder)
        for layer in found.layers:
            found[layer].on(found[layer].alone())
    put_adapter(copy.deepcopy(kit().base), str(folder), "model.adapter")


def _checkpoint(draw: random.Random) -> Files:
    files = _changed_folder(draw, kit().checkpoint)
    if draw.random() < 0.6 and "manifest.json" in files:
        # The manifest fits what is there, so that reading goes on beyond it.
        import hashlib

        told = {
            n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)}
            for n, d in files.items()
            if n != "manifest.json"
        }
        files["manifest.json"] = as_json({"format": 2, "made_on": {}, "files": told})
    return files


def _read_checkpoint(folder: Path, files: Files) -> None:
    from repbend_fast.runs.folder import RunFolder
    from repbend_fast.training.checkpoint import intact_checkpoint, load_checkpoint, moved_note

    path = folder / "checkpoints" / "step-000002"
    path.mkdir(parents=True)
    for name in files:
        shutil.copyfile(folder / name, path / name)
    run = RunFolder(folder)
    found, _ = intact_checkpoint(run)
    assert found == path
    load_checkpoint(path, kit().config, kit().model)
    import torch

    moved_note(path, torch.device("cpu"))


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
    return _changed_folder(draw, {"expected.json": as_json(_EXPECTED), "batch.0.json": as_json(_BATCH)})


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
    "adapters": Target(_adapter, _read_adapter),
    "checkpoints": Target(_checkpoint, _read_checkpoint),
    "gguf": Target(_gguf, _read_gguf),
    "golden": Target(_golden, _read_golden),
    "judges": Target(_judged, _read_judged),
}
