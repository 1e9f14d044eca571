"""Offloaded states on two streams: nothing is read before it is written, and no memory is written while another stream
reads it.

On a CPU streams are played: each operation is known by its stream and number, waiting makes one stream know what
another has done, and two operations on one piece of memory that do not know each other are a race, however lucky the
times were. Freed memory goes to the next tensor, as a GPU's allocator gives it. On a GPU the same is run with one of
the two sides slowed down.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repbend_fast.models.layers import offload
from repbend_fast.models.layers.offload import HostStates

STATES, WIDTH = 6, 16
Operation = tuple[str, int]


class PlayedStream:
    """``seen``: how many operations of each stream are done before the next one of this stream begins."""

    def __init__(self, name: str, deaf: bool = False) -> None:
        self.name, self.deaf = name, deaf
        self.seen: dict[str, int] = defaultdict(int)

    def run(self) -> Operation:
        self.seen[self.name] += 1
        return self.name, self.seen[self.name]

    def record_event(self) -> dict[str, int]:
        return dict(self.seen)

    def wait_event(self, event: dict[str, int]) -> None:
        for name, count in {} if self.deaf else event.items():
            self.seen[name] = max(self.seen[name], count)

    def wait_stream(self, other: PlayedStream) -> None:
        self.wait_event(other.record_event())


class PlayedDevice(TorchFunctionMode):
    """Memory and streams of a device, and the races seen so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deaf: str | None = None) -> None:
        super().__init__()
        self.main, self.side = PlayedStream("main", deaf == "main"), PlayedStream("side", deaf == "side")
        self.current = self.main
        self.races: list[str] = []
        self.reused = self.pinned = 0
        self._free: list[int] = []
        self._blocks: dict[int, int] = {}
        self._accesses: dict[int, list[tuple[str, Operation]]] = defaultdict(list)
        self._allocate = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(offload, "_side_stream", lambda device: self.side)

    @contextmanager
    def on(self, stream: PlayedStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(
        self, shape: Any, *, dtype: torch.dtype = torch.float32, pin_memory: bool = False, device: Any = None
    ) -> Tensor:
        """Host memory where it is pinned; else the block that was freed last, or a new one."""
        if pin_memory:
            self.pinned += 1
            return self._allocate(shape, dtype=dtype)
        memory = np.zeros(tuple(shape), dtype=np.float32)
        self.reused += bool(self._free)
        block = self._free.pop() if self._free else len(self._accesses)
        self._accesses[block]
        self._blocks[memory.ctypes.data] = block
        weakref.finalize(memory, self._free.append, block)
        return torch.from_numpy(memory)

    def touch(self, tensor: Tensor, kind: str) -> None:
        """An operation of the current stream that reads or writes ``tensor``."""
        block = self._blocks.get(tensor.data_ptr(), -tensor.data_ptr())
        operation = self.current.run()
        for earlier_kind, (stream, number) in self._accesses[block]:
            if "write" in (kind, earlier_kind) and self.current.seen[stream] < number:
                self.races.append(f"{operation[0]} may {kind} before {stream} has done its {earlier_kind}")
        self._accesses[block].append((kind, operation))

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            self.touch(arguments[1], "read")
            self.touch(arguments[0], "write")
        return function(*arguments, **(named or {}))


def run(device: PlayedDevice) -> list[bool]:
    """Forward and backward over the states as a recomputed decoder has them; whether each came back as it was."""

    def work(value: float) -> Tensor:
        made = device.empty((WIDTH,))
        made.fill_(value)
        device.touch(made, "write")
        return made

    store, same = HostStates(torch.device("cpu")), []
    store._streams = True
    with device:
        for i in range(STATES):
            hidden = work(i + 1)
            store.put(i, hidden)
            del hidden
            work(-1)  # a block's scratch, freed at once
        for i in reversed(range(STATES)):
            state = store.get(i)
            device.touch(state, "read")
            same.append(bool((state.detach() == i + 1).all()))
            del state
            work(-2)
        del store
    return same


def test_no_operation_overtakes_one_that_it_depends_on(monkeypatch) -> None:
    device = PlayedDevice(monkeypatch)
    assert run(device) == [True] * STATES
    assert device.races == []
    assert device.pinned == STATES, "a copy from or to pageable memory keeps the host waiting"
    assert device.reused > STATES, "memory was never used again, so nothing could have been overwritten"


@pytest.mark.parametrize("deaf", ["main", "side"])
def test_a_stream_that_does_not_wait_is_seen(monkeypatch, deaf) -> None:
    device = PlayedDevice(monkeypatch, deaf)
    run(device)
    other = "side" if deaf == "main" else "main"
    assert any(race.startswith(f"{deaf} may") and f"before {other}" in race for race in device.races)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["blocks", "link"])
def test_a_slow_side_changes_no_bit(slow) -> None:
    gpu, shape = torch.device("cuda"), (1 << 20,)
    stream = torch.cuda.current_stream(gpu) if slow == "blocks" else offload._side_stream(gpu)

    def wait_a_while() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms

    def work(value: float) -> Tensor:
        made = torch.empty(shape, device=gpu)
        wait_a_while()
        return made.fill_(value)

    store, same = HostStates(gpu), []
    for i in range(STATES):
        hidden = work(i + 1)
        store.put(i, hidden)
        del hidden
        work(-1)
    for i in reversed(range(STATES)):
        wait_a_while()
        state = store.get(i)
        same.append((state.detach() == i + 1).all())
        del state
        work(-2)
    assert torch.stack(same).tolist() == [True] * STATES
