"""Batches prepared ahead come in the sampler's order, resume where the loop was, and fail where the sampler fails."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from repbend_fast.data.prefetch import PreparedBatches
from repbend_fast.data.records import BatchSizes, Sequence
from repbend_fast.data.sampling import BatchSampler
from repbend_fast.errors import UserError


class Watched(list[Sequence]):
    """Examples that tell which were asked for, by which thread; number ``bad`` cannot be encoded, and ``gate`` holds
    them back.
    """

    def __init__(self, count: int, bad: int | None = None) -> None:
        super().__init__(Sequence((i, 3), 1) for i in range(count))
        self.bad = bad
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __getitem__(self, index: Any) -> Any:
        assert self.gate.wait(20)
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.bad:
            raise UserError(f"record {index}: no template holds it")
        return super().__getitem__(index)

    def fingerprint(self) -> str:
        return str(len(self))


@pytest.fixture
def made() -> Iterator[list[PreparedBatches]]:
    """What a test makes is closed behind it."""
    opened: list[PreparedBatches] = []
    yield opened
    for batches in opened:
        batches.close()


def sampler(examples: Watched, size: int = 2) -> BatchSampler:
    return BatchSampler({"safe": examples}, BatchSizes(size), 3, ("safe",))


def prepared(made: list[PreparedBatches], examples: Watched) -> PreparedBatches:
    made.append(PreparedBatches(sampler(examples)))
    return made[-1]


def test_order_is_the_samplers(made: list[PreparedBatches]) -> None:
    plain, batches = sampler(Watched(7)), prepared(made, Watched(7))
    assert [batches.next_batch() for _ in range(20)] == [plain.next_batch() for _ in range(20)]


@pytest.mark.parametrize("taken", [0, 1, 3, 9])
def test_state_is_that_of_the_batch_in_use(made: list[PreparedBatches], taken: int) -> None:
    plain, batches = sampler(Watched(7)), prepared(made, Watched(7))
    for _ in range(taken):
        plain.next_batch()
        batches.next_batch()
    batches.wait()
    state = json.loads(json.dumps(batches.state_dict()))
    assert state == plain.state_dict()
    source = sampler(Watched(7))
    source.load_state_dict(state)
    made.append(PreparedBatches(source))
    following = [plain.next_batch() for _ in range(9)]
    assert [made[-1].next_batch() for _ in range(9)] == following
    assert [batches.next_batch() for _ in range(9)] == following


def test_exactly_one_batch_is_prepared_ahead_and_elsewhere(made: list[PreparedBatches]) -> None:
    examples = Watched(20)
    batches = prepared(made, examples)
    assert examples.asked == []
    batches.next_batch()
    batches.wait()
    assert len(examples.asked) == 4
    batches.next_batch(ahead=False)
    batches.wait()
    assert len(examples.asked) == 4
    assert threading.current_thread().name not in examples.threads


def test_the_loop_goes_on_while_a_batch_is_being_prepared(made: list[PreparedBatches]) -> None:
    examples = Watched(20)
    plain, batches = sampler(Watched(20)), prepared(made, examples)
    assert batches.next_batch() == plain.next_batch()
    batches.wait()
    examples.gate.clear()
    # The batch after this one cannot be encoded yet; this one must not wait for it.
    assert batches.next_batch() == plain.next_batch()
    asked = len(examples.asked)
    examples.gate.set()
    batches.wait()
    assert (asked, len(examples.asked)) == (4, 6)


def test_an_error_comes_with_its_own_batch(made: list[PreparedBatches]) -> None:
    plain = sampler(Watched(20))
    order = [s.ids[0] for _ in range(10) for s in plain.next_batch().safe]
    batches = prepared(made, Watched(20, bad=order[4]))
    for i in (0, 2):
        assert [s.ids[0] for s in batches.next_batch().safe] == order[i : i + 2]
        batches.wait()
    state = batches.state_dict()
    with pytest.raises(UserError, match=f"record {order[4]}: no template holds it"):
        batches.next_batch()
    assert batches.state_dict() == state
    assert state["places"]["safe"]["position"] == 4


def test_ctrl_c_reaches_a_loop_that_waits_for_a_batch(made: list[PreparedBatches]) -> None:
    examples = Watched(20)
    batches = prepared(made, examples)
    examples.gate.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            batches.next_batch()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
        examples.gate.set()


def test_several_are_prepared_ahead_in_order(made: list[PreparedBatches]) -> None:
    batches, plain = prepared(made, Watched(8)), sampler(Watched(8))
    for ahead in (3, 3, 1, 0, 0, 2):
        assert batches.next_batch(ahead=ahead) == plain.next_batch()
        assert batches.state_dict() == plain.state_dict()


def test_no_more_than_asked_for_are_prepared(made: list[PreparedBatches]) -> None:
    examples = Watched(8)
    batches = prepared(made, examples)
    batches.next_batch(ahead=2)
    batches.wait()
    assert len(examples.asked) == 6
