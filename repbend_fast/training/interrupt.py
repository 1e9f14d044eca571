"""A signal that asks a training to end, once finishes the step and saves; twice stops at once."""

from __future__ import annotations

import signal
import time

from repbend_fast.signals import ENDING, HANGUP, Handlers

ONCE = 2.0
"""Seconds in which a launcher hands on a signal that its processes have had."""


class Interrupt:
    """While entered, the first signal of ``ENDING`` only sets ``requested``; a second one raises ``KeyboardInterrupt``.

    ``reason`` names the first one. ``launched``: a terminal's Ctrl-C comes a second time through the launcher, and
    counts once. So does SIGHUP, which a closing terminal and its shell both send.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self._ignored_until = 0.0
        self._launched = launched
        self.reason = ""
        self._handlers = Handlers(self._handle)

    def __enter__(self) -> Interrupt:
        self._handlers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handlers.__exit__(*exception)

    def _handle(self, number: int) -> None:
        if self.requested and (number == HANGUP or time.monotonic() < self._ignored_until):
            return
        if self.requested:
            raise KeyboardInterrupt
        self._ignored_until = time.monotonic() + (ONCE if self._launched else 0.0)
        self.requested, self.reason = True, ENDING[signal.Signals(number)]
        self._handlers.say("interrupted: saving after this step; press Ctrl-C again to stop at once")
