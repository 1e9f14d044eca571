"""What planning has measured is kept: the same plan without a measurement, and nothing taken that is not whole."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shape_recipes import recipe
from transformers import LlamaConfig

from repbend_fast.config import Config
from repbend_fast.console import CountLine, saying
from repbend_fast.objectives.streams import Stream
from repbend_fast.planning import kept, peaks, planner, profile, shapes
from repbend_fast.planning.batches import Limits, limits_of
from repbend_fast.planning.peaks import Peak
from repbend_fast.planning.planner import Plan, Planner
from repbend_fast.planning.profile import profile_key
from repbend_fast.planning.shapes import model_shape
from repbend_fast.step.levers import Levers

CPU = torch.device("cpu")
BUDGET = 40 * 10**6
SHORT = Limits(8, 8, 16)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return recipe(tmp_path / "model", layers=4, hidden=32, vocabulary=100)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that would have been run on shapes; a peak is made up from what was asked for instead."""
    found: list[str] = []

    def made_up(model: object, stream: Stream, levers: Levers, device: object, autocast: object) -> Peak:
        found.append(stream.name)
        tokens = sum(map(len, stream.sequences))
        return Peak(1000.5 * tokens - 10 * levers.checkpoint_blocks * tokens, 500.25 * tokens)

    monkeypatch.setattr(peaks, "measure_piece", made_up)
    monkeypatch.setattr(planner, "measure_piece", made_up)
    return found


def planned(config: Config, limits: Limits = SHORT) -> Plan:
    return Planner(config, CPU, limits=limits).plan(BUDGET)


def test_a_second_plan_measures_nothing_and_is_the_same(
    config: Config, folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(config)
    assert set(ran) == {"safe", "unsafe", "retain"}
    ran.clear()
    assert planned(config) == first
    assert ran == []
    # Another length is another plan.
    planned(config, Limits(8, 12, 20))
    assert ran
    monkeypatch.setenv("REPBEND_CACHE", "off")
    assert planned(config) == first


def test_damaged_entries_are_measured_and_written_anew(config: Config, folder: Path, ran: list[str]) -> None:
    first = planned(config)
    whole = {path: path.read_text() for path in sorted(folder.iterdir())}
    damages = (
        lambda text: text[:-20],
        lambda text: text.replace('"outside": ', '"outside": 1'),
        lambda text: json.dumps(json.loads(text) | {"value": "?", "checksum": kept._digest("?")}),
        lambda text: "",
    )
    assert len(whole) == len(damages)
    for (path, text), damage in zip(whole.items(), damages):
        assert damage(text) != text
        path.write_text(damage(text))
    ran.clear()
    assert planned(config) == first
    assert ran
    assert {path: path.read_text() for path in sorted(folder.iterdir())} == whole


def test_other_versions_measure_again(
    config: Config, folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(config)
    before = kept.versions()
    ran.clear()
    monkeypatch.setattr(kept, "versions", lambda: {**before, "torch": "another"})
    planned(config)
    assert ran
    assert before["code"]
    assert before["torch"] == torch.__version__.split("+")[0] or before["torch"] == torch.__version__


def test_what_the_key_tells_apart(tmp_path: Path) -> None:
    def key(*overrides: str, levers: Levers | None = None) -> kept.Json:
        config = recipe(tmp_path, *overrides, layers=4, hidden=32, vocabulary=100)
        shape, _ = model_shape(config.model)
        return profile_key(config, shape, CPU, limits_of(config), levers or Levers(), "sdpa")

    plain = key()
    assert key() == plain
    # What no peak depends on is not in it.
    assert key("training.learning_rate=1e-3", "memory.budget=1GB") == plain
    others = ["lora.r=4", "model.dtype=bfloat16", "objective.kl=0", "training.examples=3", "data.max_answer_tokens=9"]
    assert len({json.dumps(key(other), sort_keys=True) for other in others} | {json.dumps(plain, sort_keys=True)}) == 6
    assert key(levers=Levers(packing="on")) != plain
    assert key("model.trust_remote_code=true") is None


def test_the_shape_in_a_gguf_file_is_read_once_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    file, shape = tmp_path / "model.gguf", LlamaConfig(hidden_size=64, rope_theta=12.0, vocab_size=77)
    file.write_bytes(b"weights")
    found: list[LlamaConfig] = []

    def read() -> LlamaConfig:
        found.append(shape)
        return shape

    for _ in range(3):
        assert shapes._kept_shape(file, read).to_dict() == shape.to_dict()
    assert len(found) == 1
    file.write_bytes(b"other weights")
    shapes._kept_shape(file, read)
    assert len(found) == 2
    shape.vocab_size, shape.to_dict = 78, lambda: {"model_type": "nobody"}
    file.write_bytes(b"yet others")
    for _ in range(2):
        assert shapes._kept_shape(file, read) is shape
    assert len(found) == 4
    assert shapes._kept_shape(tmp_path / "on the hub.gguf", read) is shape


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    config: Config, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path / "file"))
    assert planned(config).streams
    assert ran
    assert not kept.write("peaks", {"a": 1}, [1])


def test_writers_and_readers_of_one_entry_do_not_disturb_each_other(folder: Path) -> None:
    values: list[list[kept.Json]] = [[float(n)] * 5000 for n in range(4)]
    seen: list[kept.Json] = []

    def work(value: list[kept.Json]) -> None:
        for _ in range(15):
            assert kept.write("peaks", {"key": 1}, value)
            seen.append(kept.read("peaks", {"key": 1}))

    threads = [threading.Thread(target=work, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 60
    assert all(value in values for value in seen)
    assert len(list(folder.iterdir())) == 1


def test_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_ENTRIES", 3)
    for n in range(5):
        kept.write("peaks", n, n)
        for path in folder.glob("*.json"):
            if json.loads(path.read_text())["value"] < n:
                stamp = path.stat().st_mtime - 10
                os.utime(path, (stamp, stamp))
    assert [kept.read("peaks", n) for n in range(5)] == [None, None, 2, 3, 4]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(profile, "_line", lambda: CountLine("planning", 0, seconds=0.0))
    found: list[str] = []
    with saying(found.append):
        yield found


def test_it_says_what_it_is_doing(config: Config, folder: Path, ran: list[str], lines: list[str]) -> None:
    planned(config)
    assert any("safe stream" in line for line in lines)
    assert any("retain stream, all blocks" in line for line in lines)
    # The whole is known from the start: three streams in pieces, and three through all blocks.
    assert [line.split()[1] for line in lines][:3] == ["1/6", "2/6", "3/6"]
    lines.clear()
    planned(config)
    assert lines == []
