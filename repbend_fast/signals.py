"""Handlers of the signals that ask a process to end: Ctrl-C, a SIGTERM as schedulers and ``timeout`` send it, or a
terminal that closes.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from types import FrameType

from repbend_fast.console import say

HANGUP = getattr(signal, "SIGHUP", None)
"""Not on Windows."""
ENDING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"} | ({HANGUP: "SIGHUP"} if HANGUP else {})
"""Signals that ask for an end, and how lines name them."""


class Handlers:
    """While entered, ``handle`` is called with the number of each signal of ``ENDING``, and may ``say`` lines. What had
    them before has them again afterwards.

    Under ``nohup`` SIGHUP stays ignored. A SIGINT that was ignored, as in a script's background job, is handled: what
    it asks for loses nothing. Outside the main thread nothing is handled: the importer's own handling stays.
    """

    def __init__(self, handle: Callable[[int], None]) -> None:
        self._handle = handle
        self._previous: dict[int, signal._HANDLER] = {}
        self._voice = _Voice()

    def __enter__(self) -> Handlers:
        self._voice.__enter__()
        for number in ENDING:
            if number == HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            # None: a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._voice.__exit__(*exception)

    def say(self, text: str) -> None:
        """Have ``text`` said soon, before this is left. Takes no lock that a handler could wait for."""
        self._voice.say(text)

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._handle(number)


class _Voice:
    """Says lines while it is entered, from a thread of its own: a handler may have interrupted a write of its own
    thread, and a stream that is being written cannot be written again (``RuntimeError``).
    """

    def __enter__(self) -> _Voice:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=copy_context().run, args=(self._speak,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.put(None)
        self._thread.join()

    def say(self, text: str) -> None:
        self._lines.put(text)

    def _speak(self) -> None:
        while (text := self._lines.get()) is not None:
            with suppress(OSError, SystemExit):  # nobody reads any more; the work's own lines decide what that means
                say(text)
