"""The host's rates: measured once a machine, kept, and seen by the planner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shape_recipes import recipe

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.planning import host, kept
from repbend_fast.planning.cards import find_card
from repbend_fast.planning.cost import StepCost
from repbend_fast.planning.host import ASSUMED, HostCost, host_cost, measure_host
from repbend_fast.planning.planner import Planner
from repbend_fast.step.levers import Levers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATES = HostCost(2e-5, 1e-5, 3e-5)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[HostCost]:
    """What was measured, in a cache of its own."""
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path))
    found: list[HostCost] = []

    def measure() -> HostCost:
        found.append(RATES)
        return RATES

    monkeypatch.setattr(host, "measure_host", measure)
    return found


def test_measured_once_and_kept(measured: list[HostCost], tmp_path: Path) -> None:
    assert [host_cost(CUDA), host_cost(CUDA)] == [RATES, RATES]
    assert len(measured) == 1
    (entry,) = tmp_path.iterdir()
    entry.write_text(entry.read_text()[:-9])
    assert host_cost(CUDA) == RATES
    assert len(measured) == 2


def test_another_torch_is_measured_again(measured: list[HostCost], monkeypatch: pytest.MonkeyPatch) -> None:
    host_cost(CUDA)
    before = kept.versions()
    monkeypatch.setattr(kept, "versions", lambda: {**before, "torch": "another"})
    host_cost(CUDA)
    assert len(measured) == 2


def test_what_cannot_be_kept_is_not_measured_and_assumed(
    measured: list[HostCost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_cost(CPU) == ASSUMED
    monkeypatch.setenv("REPBEND_CACHE", "off")
    assert host_cost(CUDA) == ASSUMED
    assert measured == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path / "file"))
    assert host_cost(CUDA) == ASSUMED
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "measure_host", lambda: None)
    assert host_cost(CUDA) == ASSUMED


@pytest.mark.parametrize("value", [{"forward": 1.0, "backward": 1e-5, "op": 1e-5}, {"forward": -1e-5}, [1], "?"])
def test_rates_that_cannot_be_are_measured_again(measured: list[HostCost], tmp_path: Path, value: kept.Json) -> None:
    host_cost(CUDA)
    (entry,) = tmp_path.iterdir()
    key = json.loads(entry.read_text())["key"]
    kept.write("host", key, value)
    assert host_cost(CUDA) == RATES
    assert len(measured) == 2


def test_this_machine_can_be_measured() -> None:
    rates = measure_host()
    assert rates is not None
    for rate in (rates.forward, rates.backward, rates.op):
        assert 1e-8 < rate < 0.05
    # Backward runs in C++, forward in Python.
    assert rates.backward < 3 * rates.forward


def test_a_slow_host_gets_large_pieces(tmp_path: Path) -> None:
    """Small pieces save padding; each costs its launches."""
    config = recipe(tmp_path, "memory.packing=off", layers=4)
    planner = Planner(config, CUDA, find_card("h100"), host=RATES)
    assert planner.cost.host == RATES
    answered, lengths = Sequence((1,) * 20, 10), [Sequence((1,) * n, 0) for n in (1000, 10, 10, 10)]
    batch = Batch((answered,) * 4, (answered,) * 4, (), tuple(lengths))
    retain = next(s for s in planner.objective.streams(batch, 0) if s.name == "retain")
    seconds = {}
    for name, rate in {"fast": 1e-12, "slow": 4e-4}.items():
        cost = StepCost(replace(planner.cost.sizes, block=10**9), 4, planner.card, HostCost(rate, rate, rate))
        seconds[name] = [cost.seconds([retain], Levers(piece_tokens=sizes)) for sizes in ({}, {"*": 1000})]
    assert seconds["fast"][0] > 2 * seconds["fast"][1]
    assert seconds["slow"][0] < seconds["slow"][1]
