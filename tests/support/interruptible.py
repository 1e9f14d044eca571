"""A child process that Ctrl-C reaches wherever the tests run: the background of a shell inherits an ignored SIGINT,
which Python then never turns into KeyboardInterrupt.
"""

from __future__ import annotations

import signal


def take_interrupts() -> None:
    """For ``preexec_fn``."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
