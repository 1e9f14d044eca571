"""Launches and bytes of a step, counted without a GPU: they do not rise unseen, and the counter counts right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from repbend_kernels.selection import resolve
from torch import Tensor

from benchmarks.step import step_counts
from benchmarks.step.launches import LaunchCounter
from benchmarks.step.pointers import access_of
from benchmarks.step.pretended_cuda import pretended_cuda
from benchmarks.step.step_counts import (
    BLOCKS,
    FEW_BLOCKS,
    PATH,
    SETTINGS,
    CountRecord,
    CountRow,
    arithmetic,
    count,
    main,
    missed_count_goals,
    risen,
    subject,
)
from repbend_fast.planning.host import BLOCK, DEQUANTISING
from repbend_fast.planning.shapes import FAKE_MODE

OF_BLOCKS = ("LoRA", "products", "elementwise", "Liger", "attention", "dropout")


@pytest.fixture(scope="module")
def record() -> CountRecord:
    return json.loads(PATH.read_text())


def row_of(record: CountRecord, setting: str, blocks: int) -> CountRow:
    (row,) = [row for row in record["rows"] if (row["setting"], row["blocks"]) == (setting, blocks)]
    return row


def test_launches_and_bytes_have_not_risen(record: CountRecord) -> None:
    counted = subject(FEW_BLOCKS)
    for setting, memory in SETTINGS.items():
        row = count(counted, setting, memory)
        recorded = row_of(record, setting, FEW_BLOCKS)
        assert not risen(recorded, row), "meant so? python -m benchmarks.step.step_counts records it"
        # Whatever is missing here would let the comparison pass.
        assert {p["part"] for p in row["parts"]} >= {"reference", "adapted", "backward"}
        assert {p["kind"] for p in row["parts"]} >= {"LoRA", "Liger", "products", "dequantisation", "attention", "head"}


@pytest.mark.parametrize("name", step_counts.COUNTED)
def test_a_rise_is_seen(record: CountRecord, name: str) -> None:
    row = row_of(record, next(iter(SETTINGS)), FEW_BLOCKS)
    assert risen(row, row | {name: int(1.02 * row[name])}) == []
    (line,) = risen(row, row | {name: int(1.04 * row[name])})
    assert name in line


def test_goals_are_read_off_the_full_depth(record: CountRecord) -> None:
    row = row_of(record, "streams apart", BLOCKS)
    good = row | {"launches": 12_000, "lora_bytes": 140 * 10**9}
    assert missed_count_goals(record | {"rows": [good]}) == []
    assert missed_count_goals(record | {"rows": [row | {"blocks": FEW_BLOCKS, "launches": 10**6}]}) == []
    for name in ("launches", "lora_bytes"):
        assert len(missed_count_goals(record | {"rows": [good | {name: good[name] + 1}]})) == 1


def test_the_host_s_model_knows_how_many_launches_a_block_has(record: CountRecord) -> None:
    """Without the head, distances and what surrounds the blocks."""
    row = row_of(record, "streams apart", BLOCKS)
    parts = {(p["part"], p["kind"]): p["launches"] for p in row["parts"]}
    passes = parts["reference", "attention"]
    for name, calls in BLOCK.items():
        if name == "recompute":
            assert calls == BLOCK["adapted"]
            continue
        of_blocks = sum(n for (part, kind), n in parts.items() if part == name and kind in OF_BLOCKS) / passes
        assert calls.forward + calls.backward == pytest.approx(of_blocks, rel=0.25)
        # Those of the taps and of the head are few beside the blocks'.
        assert calls.ops == pytest.approx(row["op_calls"].get(name, 0) / passes, rel=0.25, abs=1)
        if calls.forward:
            assert pytest.approx(parts[name, "dequantisation"] / passes, rel=0.25) == DEQUANTISING


def counted(work: Callable[[], object]) -> LaunchCounter:
    counter = LaunchCounter()
    with pretended_cuda(counter.launched), FAKE_MODE, counter:
        work()
    return counter


def totals(counter: LaunchCounter) -> tuple[int, int]:
    return sum(c.launches for c in counter.found.values()), sum(c.bytes for c in counter.found.values())


@pytest.mark.parametrize(
    ("work", "launches", "size"),
    [
        (lambda x, y: x + y, 1, 3 * 400),
        (lambda x, y: x.add_(y), 1, 3 * 400),
        (lambda x, y: x.copy_(y), 1, 2 * 400),
        (lambda x, y: x.view(2, 50).T, 0, 0),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: torch.add(x, y, out=torch.empty_like(x)), 1, 3 * 400),
        (lambda x, y: (x[:, None] @ y[None, :])[0], 1, 400 + 400 + 40000),
    ],
    ids=["add", "in place", "copy", "view", "empty", "out", "product"],
)
def test_operations_of_torch(work: Callable[[Tensor, Tensor], object], launches: int, size: int) -> None:
    with FAKE_MODE:
        x, y = torch.empty(100), torch.empty(100)
    assert totals(counted(lambda: work(x, y))) == (launches, size)


@triton.jit
def _fetch(pointer, offsets):
    return tl.load(pointer + offsets)


@triton.jit
def add_at_kernel(x, index, into, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = _fetch(index, offsets)
    target = into + places
    tl.store(target, tl.load(x + offsets) + tl.load(target), mask=offsets < count)


def test_a_kernel_of_triton() -> None:
    function = add_at_kernel.fn
    access = access_of(function)
    tensors = {"x", "index", "into"}
    assert access.read & tensors == {"x", "index", "into"}
    assert access.written & tensors == {"into"}
    with FAKE_MODE:
        x, index = torch.empty(100), torch.empty(100, dtype=torch.int64)
        into = torch.empty(50)
    # Arguments by place and by name; the tensor that is read and written counts twice.
    assert totals(counted(lambda: add_at_kernel[(1,)](x, index, into=into, count=100, BLOCK=128))) == (
        1,
        400 + 800 + 2 * 200,
    )


def test_only_the_project_sees_cuda() -> None:
    with FAKE_MODE:
        x = torch.empty(3)
    with pretended_cuda(lambda kernel, tensors: None):
        assert resolve(None, x) == "triton"
        assert not x.is_cuda
        assert x.device.type == "cpu"
    assert resolve(None, x) == "torch"


def test_it_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "counts.json"
    assert main(["--blocks", "2", "--results", str(path)]) == 0
    assert "2 blocks" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["rows"][0]["launches"] > 0
    assert written["versions"]["torch"]


def test_arithmetic_takes_the_slowest_of_three(record: CountRecord) -> None:
    parts = [
        {"part": "adapted", "kind": "products", "launches": 1, "bytes": 0, "flops": 7 * 10**14},
        {"part": "adapted", "kind": "LoRA", "launches": 1, "bytes": 6 * 10**12},
        {"part": "adapted", "kind": "elementwise", "launches": 10**6, "bytes": 1},
    ]
    row = row_of(record, "streams apart", BLOCKS) | {"parts": parts}
    lines = arithmetic(record | {"rows": [row], "needed_flops": 7 * 10**14}).splitlines()
    shown = {line.split()[0]: line.split()[-2:] for line in lines if line.strip()}
    assert shown["products"] == ["1000.0", "4666.7"]
    assert shown["LoRA"] == ["2000.0", "6451.6"]
    assert shown["elementwise"] == ["2000.0", "2000.0"]
    assert shown["share"] == ["0.20", "0.36"]
