"""Ctrl-C, a SIGTERM as schedulers and ``timeout`` send it, or a terminal that closes, once finishes the step and saves;
twice stops at once.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

from repbend_fast.console import SignalVoice

ONCE = 2.0
"""Seconds in which a launcher hands on a signal that its processes have had."""
HANGUP = getattr(signal, "SIGHUP", None)
"""Not on Windows."""
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"} | ({HANGUP: "SIGHUP"} if HANGUP else {})


class Interrupt:
    """While entered, the first signal of ``SIGNALS`` only sets ``requested``; a second one raises
    ``KeyboardInterrupt``.

    ``reason`` names the first one. ``launched``: a terminal's Ctrl-C comes a second time through the launcher, and
    counts once. So does SIGHUP, which a closing terminal and its shell both send; ``nohup`` has it ignored as before.
    """

    def __init__(self, launched: bool = False) -> None:
        self.requested = False
        self._ignored_until = 0.0
        self._launched = launched
        self.reason = ""
        self._previous: dict[int, signal._HANDLER] = {}
        self._voice = SignalVoice()

    def __enter__(self) -> Interrupt:
        self._voice.__enter__()
        for number in SIGNALS:
            if number == HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: the importer's own handling stays
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            # None: a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._voice.__exit__(*exception)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and (number == HANGUP or time.monotonic() < self._ignored_until):
            return
        if self.requested:
            raise KeyboardInterrupt
        self._ignored_until = time.monotonic() + (ONCE if self._launched else 0.0)
        self.requested, self.reason = True, SIGNALS[signal.Signals(number)]
        self._voice.say("interrupted: saving after this step; press Ctrl-C again to stop at once")
