"""The depth of a GGUF model is read from its header, so that a window beyond it is refused before anything
is loaded.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from repbend_fast.config import load_config
from repbend_fast.errors import UserError
from repbend_fast.models.gguf import gguf_blocks
from repbend_fast.training.preflight import check_depth


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _file(path: Path, *entries: bytes, version: int = 3) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 7, len(entries)) + b"".join(entries) + b"\0" * 64)
    return path


ARCHITECTURE = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
DEPTH = _text("llama.block_count") + struct.pack("<II", 4, 30)
OTHERS = (
    _text("tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("ü"),
    _text("scores") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<fff", 0, 1, 2),
    _text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQB", 7, 1, 1),
    _text("other.block_count") + struct.pack("<IQ", 10, 4),
    _text("rope") + struct.pack("<Id", 12, 0.5),
)


def test_the_depth_stands_in_the_header(tmp_path) -> None:
    assert gguf_blocks(_file(tmp_path / "a.gguf", *OTHERS, ARCHITECTURE, *OTHERS, DEPTH)) == 30
    assert gguf_blocks(_file(tmp_path / "b.gguf", ARCHITECTURE, *OTHERS)) is None


def test_files_without_a_header_that_is_known(tmp_path) -> None:
    whole = _file(tmp_path / "a.gguf", *OTHERS, ARCHITECTURE, DEPTH).read_bytes()
    for name, content in {
        "empty": b"",
        "other": b"PK" + whole[2:],
        "cut": whole[:60],
        "noise": whole[:24] + b"\xff" * 90,
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert gguf_blocks(path) is None
    nested = _text("nested") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    listed = _text("llama.block_count") + struct.pack("<IIQI", 9, 4, 1, 30)
    for entries in ((nested, ARCHITECTURE, DEPTH), (ARCHITECTURE, listed)):
        assert gguf_blocks(_file(tmp_path / "odd.gguf", *entries)) is None
    assert gguf_blocks(_file(tmp_path / "old.gguf", ARCHITECTURE, DEPTH, version=1)) is None
    assert gguf_blocks(tmp_path / "none.gguf") is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective.window_start=28", "this model has hidden states 0 … 30"),
        ("lora.blocks=[0, 30]", "the model has blocks 0 … 29"),
    ],
)
def test_a_window_beyond_a_gguf_models_depth_is_refused_early(tmp_path, override, expected) -> None:
    _file(tmp_path / "m.gguf", ARCHITECTURE, DEPTH)
    model = [f"model.name={tmp_path}", "model.gguf_file=m.gguf", "objective.window_size=5"]
    check_depth(load_config("demo", [*model, "objective.window_start=20"]))
    with pytest.raises(UserError, match=expected):
        check_depth(load_config("demo", [*model, override]))
