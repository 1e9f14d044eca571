"""Joining the processes that a launcher started, and ending them together: one that fails ends all, with its reason."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from repbend_fast.distributed.launch import Launch, launch
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import EndedElsewhere, UserError, one_line

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others. That one has failed is known sooner; one that works on may take long."""
EVERY, GRACE = 0.5, 10.0
"""Seconds between looks for a failure, and those that a process has to end by itself once there is one."""
_FAILED = "repbend/failed"


@contextmanager
def joined(device: str, shard: bool) -> Iterator[Ranks]:
    """The processes of this run, alone where no launcher started several. A process group that is there is used, and
    stays.

    Args:
        device: as ``model.device``. Each process takes the card of its number on its machine.
        shard: whether each holds a part of the base.

    Raises:
        UserError: too few cards, a device that several cannot share, sharding without others.
        EndedElsewhere: another process failed.
    """
    own = launch()
    if dist.is_available() and dist.is_initialized():
        there = Ranks(dist.get_rank(), dist.get_world_size(), shard)
        yield there
        there.gathered(None)
        return
    if own.count == 1:
        if shard:
            raise UserError(
                "distributed.shard=fsdp divides the base among several processes, and this one is alone; start "
                "torchrun --nproc-per-node N -m repbend_fast train …, or set distributed.shard=none"
            )
        yield ALONE
        return
    backend = _backend(device, own)
    store, _, _ = next(dist.rendezvous("env://", own.number, own.count, timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=own.number, world_size=own.count, timeout=TIMEOUT)
    ranks = Ranks(own.number, own.count, shard)
    with _together(store, ranks):
        yield ranks
    dist.destroy_process_group()


def _backend(device: str, own: Launch) -> str:
    """Control messages go through gloo on the host, so that none waits for the device."""
    kind, _, number = device.partition(":")
    if kind == "mps" or number:
        raise UserError(f"model.device={device}: {own.count} processes cannot share it; set model.device=auto")
    if kind == "cpu" or not torch.cuda.is_available():
        return "gloo"
    if own.local >= torch.cuda.device_count():
        raise UserError(
            f"process {own.number} is number {own.local} on its machine, which has {torch.cuda.device_count()} cards; "
            "start as many processes as there are cards"
        )
    torch.cuda.set_device(own.local)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _together(store: dist.Store, ranks: Ranks) -> Iterator[None]:
    over = threading.Event()
    threading.Thread(target=_watch, args=(_apart(store), ranks, over), daemon=True).start()
    try:
        yield
        ranks.gathered(None)
    except BaseException as error:
        over.set()
        first = _say_failed(store, ranks, error)
        if first is not None and not isinstance(error, KeyboardInterrupt):
            raise EndedElsewhere(first) from error
        raise
    finally:
        over.set()


def _apart(store: dist.Store) -> dist.Store:
    """A connection of its own, which does not wait behind another's call."""
    return store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it


def _say_failed(store: dist.Store, ranks: Ranks, error: BaseException) -> str | None:
    """Tell the others why this process ends. Returns what another one said before it."""
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
    own = f"process {ranks.number} of {ranks.count} ended the run: {reason}"
    try:
        found = store.compare_set(_FAILED, "", own).decode()
    except RuntimeError:  # the process that held it is gone
        return None
    if found != own:
        return found
    # Others read it before this process and its connections, which may be theirs too, are gone.
    time.sleep(3 * EVERY)
    return None


def _watch(store: dist.Store, ranks: Ranks, over: threading.Event) -> None:
    """End this process where another has failed and this one waits for it on the device, which nothing interrupts."""
    reason = ""
    while not reason:
        if over.wait(EVERY):
            return
        try:
            if store.check([_FAILED]):
                reason = store.get(_FAILED).decode()
        except RuntimeError:
            reason = "the first process of the run is gone"
    if not over.wait(GRACE):
        if ranks.first:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(2)
