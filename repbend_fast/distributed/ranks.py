"""What the processes of one run tell each other, all through ``torch.distributed``.

Every process calls the same methods in the same order; nothing else may come between that one process alone reaches.
Alone, each method is the identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from repbend_fast.errors import UserError

T = TypeVar("T")
BUCKET = 1 << 23
"""Elements that are added up in one call."""


class LostProcess(UserError):
    """Another process of the run is gone, and did not say why."""


@dataclass(frozen=True)
class Ranks:
    """This process is ``number`` of ``count``.

    ``lockstep``: every pass of the model needs all processes, as each holds a part of the base
    (``distributed.shard=fsdp``).
    """

    number: int = 0
    count: int = 1
    lockstep: bool = False

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.number == 0

    def shares(self, lengths: Seq[int], turn: int = 0) -> list[tuple[int, ...]]:
        """For each process the members of a stream that it runs, of sequences of these lengths.

        Dealt by length, there and back, so that each has about as many tokens. With ``turn``, the stream's number among
        those that share a pass, another process begins, or one would get the longest of every stream.
        """
        order = sorted(range(len(lengths)), key=lambda member: -lengths[member])
        there_and_back = [*range(self.count), *reversed(range(self.count))]
        dealt: list[list[int]] = [[] for _ in range(self.count)]
        for place, member in enumerate(order):
            dealt[(there_and_back[place % len(there_and_back)] + turn) % self.count].append(member)
        return [tuple(sorted(members)) for members in dealt]

    def part(self, items: Seq[T]) -> list[T]:
        """The items of this process, as many for each: where they do not come out even, first ones are done twice."""
        if not self.several or not items:
            return list(items)
        each = -(-len(items) // self.count)
        return [items[place % len(items)] for place in range(self.number, each * self.count, self.count)]

    def total_(self, tensors: Seq[Tensor]) -> None:
        """Put the sum over the processes into each tensor, in the same bits everywhere; 16-bit ones are added up in 32
        bits.
        """
        if not self.several:
            return
        kinds: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.device, tensor.dtype].append(tensor)
        for (_, dtype), of_kind in kinds.items():
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            for bucket in _buckets(of_kind):
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket]).to(wide)
                with _heard():
                    dist.all_reduce(flat)
                for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                    tensor.detach().copy_(total.view_as(tensor))

    def totals(self, tensors: Seq[Tensor]) -> list[Tensor]:
        """The sums over the processes; ``tensors`` stay as they are."""
        if not self.several:
            return list(tensors)
        copies = [tensor.detach().clone() for tensor in tensors]
        self.total_(copies)
        return copies

    def any(self, flag: bool) -> bool:
        """Whether it holds for any process. Waits for no device."""
        if not self.several:
            return flag
        found = torch.tensor(int(flag))
        with _heard():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def same(self, value: T) -> T:
        """The first process's ``value``, which must be picklable."""
        if not self.several:
            return value
        holder: list[object] = [value]
        with _heard():
            dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """The value of each process, in their order."""
        if not self.several:
            return [value]
        found: list[object] = [None] * self.count
        with _heard():
            dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def spread_(self, tensors: Seq[Tensor]) -> None:
        """Put the first process's values into each tensor."""
        if self.several:
            with torch.no_grad(), _heard():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)


ALONE = Ranks()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    yield bucket


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what every backend raises when a peer is gone
        raise LostProcess(
            "another process of the run ended and did not say why (killed, or its machine ran out of memory?); see "
            "the launcher's lines, and resume"
        ) from error
