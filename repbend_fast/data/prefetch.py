"""Micro-batches prepared ahead by a thread, so that the device does not wait for the tokenizer."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

from repbend_fast.data.records import Batch
from repbend_fast.data.sampling import BatchSampler


class PreparedBatches:
    """Hands out ``sampler``'s micro-batches in its order; while one is in use, the next are drawn and encoded in the
    background.

    ``state_dict`` is the sampler's as of the last batch handed out, so a run resumed from it draws the prepared ones
    anew. One thread draws, in order, and no batch is prepared before the first is asked for: what comes out is what
    ``sampler.next_batch`` gives. A tokenizer must not be used by two threads at once: call ``wait`` before encoding or
    decoding anything elsewhere.
    """

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler = sampler
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare-batch")
        self._prepared: deque[Future[tuple[Batch, dict[str, object]]]] = deque()
        self._state: dict[str, object] | None = None

    def next_batch(self, ahead: int = 1) -> Batch:
        """The next micro-batch; of those after it ``ahead`` are, or begin to be, prepared.

        Raises:
            UserError: as the sampler or the encoder raise it, at the batch that it concerns.
        """
        prepared = self._prepared.popleft() if self._prepared else self._thread.submit(self._prepare)
        batch, self._state = prepared.result()
        while len(self._prepared) < ahead:
            self._prepared.append(self._thread.submit(self._prepare))
        return batch

    def state_dict(self) -> dict[str, object]:
        """The sampler's state after the last batch that was handed out."""
        if self._state is None:
            self._state = self._sampler.state_dict()
        return self._state

    def wait(self) -> None:
        """Until nothing runs in the background. An error of a batch being prepared stays with it."""
        wait(self._prepared)

    def close(self) -> None:
        """Finish what runs, then end the thread. Handing out batches is over; ``state_dict`` is not."""
        self._thread.shutdown(wait=True)

    def _prepare(self) -> tuple[Batch, dict[str, object]]:
        return self._sampler.next_batch(), self._sampler.state_dict()
