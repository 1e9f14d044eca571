"""Work over many equal things at once, in parts that halve when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from repbend_fast.errors import UserError
from repbend_fast.step.retreat import OutOfMemory, attempt

T = TypeVar("T")

SHORTER = "shorten the prompts or set model.quantization=nf4"


class Chunks:
    """Work over many equal things in chunks, which halve for good when one runs out of memory.

    Args:
        size: things of a chunk at first.
        what: what was being done, for the error.
        remedy: what the user can do about it.
        whole: a chunk that runs out of memory is refused, since other processes work on theirs at the same time
            (``Ranks.lockstep``).

    Attributes:
        size: the things of a chunk from now on.
    """

    def __init__(
        self, size: int, device: torch.device, what: str, remedy: str = SHORTER, *, whole: bool = False
    ) -> None:
        self.size = size
        self._device = device
        self._what = what
        self._remedy = remedy
        self._whole = whole

    def over(self, count: int, work: Callable[[slice], T], each: Callable[[int], str] = lambda _: "") -> list[T]:
        """``work`` on the slices of ``count`` things, in order.

        Args:
            each: what the error says of a single thing that is too large, by its number.

        Raises:
            UserError: there is no memory for a single one.
        """
        results: list[T] = []
        done = 0
        while done < count:
            chosen = slice(done, min(done + self.size, count))
            result = attempt(partial(work, chosen), self._device)
            if isinstance(result, OutOfMemory):
                if chosen.stop - done == 1:
                    what = f"{self._what}{each(done)}"
                    raise UserError(f"out of memory in {what} ({result.reason}); {self._remedy}")
                if self._whole:
                    raise UserError(
                        f"out of memory in {self._what} of {chosen.stop - done} at once ({result.reason}); with "
                        f"distributed.shard=fsdp lower evaluation.batch_size, or start more processes"
                    )
                self.size = (chosen.stop - done) // 2
                continue
            results.append(result)
            done = chosen.stop
        return results

    def rows(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """``over``, and what each slice gives joined along its first dimension."""
        return torch.cat(self.over(count, work))
