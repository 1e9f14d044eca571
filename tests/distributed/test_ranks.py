"""Who takes what, what a launcher says, and what one process alone refuses."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from objective_runs import ALL_CONFIGS, STEPS
from tiny_models import adapted_model, ragged_batch
from tiny_run import TinyRun

from repbend_fast import api
from repbend_fast.cli import main
from repbend_fast.distributed.joining import joined
from repbend_fast.distributed.launch import Launch, launch
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, prepared
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamRunner
from repbend_fast.step import runner as runner_module
from repbend_fast.step.levers import Levers


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_a_partition_of_about_equal_lengths(count: int) -> None:
    draw = random.Random(count)
    lengths = [draw.randint(10, 500) for _ in range(24)]
    shares = Ranks(0, count).shares(lengths)
    assert sorted(member for share in shares for member in share) == list(range(24))
    assert {len(share) for share in shares} == {24 // count}
    tokens = [sum(lengths[member] for member in share) for share in shares]
    assert max(tokens) - min(tokens) < 500
    # Every process deals the same.
    assert shares == Ranks(count - 1, count).shares(lengths)


def test_streams_of_one_pass_do_not_give_one_process_all_of_their_longest() -> None:
    dealt = [Ranks(0, 2).shares([90, 10], turn) for turn in range(4)]
    assert dealt == [[(0,), (1,)], [(1,), (0,)], [(0,), (1,)], [(1,), (0,)]]
    assert Ranks(0, 3).shares([5, 4, 3], 2) == [(1,), (2,), (0,)]


def test_parts_cover_everything_and_are_of_one_size() -> None:
    parts = [Ranks(number, 3).part("abcde") for number in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert set("".join(map("".join, parts))) == set("abcde")
    assert ALONE.part("abc") == ["a", "b", "c"]
    assert Ranks(1, 3).part("") == []


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch() == Launch(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for every job
    assert launch() == Launch(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    assert launch() == Launch(3, 4, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch() == Launch(3, 4, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="RANK=4 with WORLD_SIZE=4"):
        launch()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK=first: must be a number"):
        launch()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:1", "model.device=cuda:1: 2 processes cannot share it"),
        ("mps", "model.device=mps: 2 processes cannot share it"),
    ],
)
def test_a_device_that_several_cannot_share(device: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=reason), joined(device, shard=False):
        pass


def test_one_process_has_nothing_to_divide(tiny: TinyRun) -> None:
    with pytest.raises(UserError, match=r"distributed\.shard=fsdp divides the base among several processes"):
        tiny.train("distributed.shard=fsdp")
    with pytest.raises(UserError, match=r"memory\.budget=8GB plans for a process that holds the whole base"):
        tiny.config("distributed.shard=fsdp", "memory.budget=8GB")


def test_other_commands_are_refused_in_several(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["recipes", "ls"]) == 2
    assert capsys.readouterr().err == (
        "error: only train and data make run in several processes; start this command without torchrun\n"
    )


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("command", ["train", "data make"])
def test_the_first_alone_prints_what_json_asks_for(
    command: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "made.json").write_text("{}", encoding="utf-8")
    run = SimpleNamespace(folder="run", adapter=None, interrupted=False, evaluation=None)
    monkeypatch.setattr(api, "train", lambda *_, **__: run)
    monkeypatch.setattr(api, "make_data", lambda *_, **__: tmp_path / "overlay.yaml")
    words = ["demo"] if command == "train" else ["harbour", "--model=demo", f"--out={tmp_path}"]
    assert main([*command.split(), *words, "--json"]) == 0
    assert bool(capsys.readouterr().out) == (number == 0)


def test_out_of_memory_in_lockstep_names_the_levers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece cannot be done again while the others go on, so no lever moves."""
    model = adapted_model()
    objective = build_objective(ALL_CONFIGS["repbend"], find_decoder(model).num_blocks, STEPS)
    with prepared(model, Levers()) as ready:
        runner = StreamRunner(ready, Levers(), ranks=Ranks(0, 1, lockstep=True))

        def full(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(runner_module, "adapted_pass", full)
        with pytest.raises(UserError, match=r"memory\.piece_tokens=\d+ or memory\.checkpoint_blocks=all"):
            runner.backward(objective.streams(ragged_batch(), 0)[0], dropout_seed=0)
        assert runner.levers == Levers()
