"""What a run tells its user while it works: lines, tables, a live bar. On the terminal, to a caller's function, or
nowhere.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

Say = Callable[[str], None]
"""Takes what is said, a line or a few at a time, without the last line's end."""
_TABLE_WIDTH = 100


def terminal(text: str) -> None:
    """Print a line for the user as it is: paths keep their brackets, and a command to copy is not wrapped."""
    with _written():
        terminal_console().print(text, markup=False, emoji=False, soft_wrap=True)


@cache
def terminal_console() -> Console:
    """Standard output, as ``rich`` draws on it."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


# A thread that a caller starts has the terminal again, as the threads of a comparison need it.
_listener: ContextVar[Say | None] = ContextVar("listener", default=terminal)


_outlives: ContextVar[bool] = ContextVar("outlives", default=False)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Work inside goes on where nobody reads any more what it says: a closed terminal, a pipe whose reader has ended, a
    full disk under a redirected output.
    """
    token = _outlives.set(True)
    try:
        yield
    finally:
        _outlives.reset(token)


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except (OSError, SystemExit):  # rich ends the program where a pipe's reader has ended
        if not _outlives.get():
            raise
        for stream in (sys.stdout, sys.stderr):
            _silence_if_dead(stream)


def _silence_if_dead(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
            stream.flush()


@contextmanager
def saying(listener: Say | None) -> Iterator[None]:
    """What is said inside goes to ``listener``; to nobody with None."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_terminal() -> bool:
    """Whether what is said goes to a terminal, where it can be drawn over."""
    return _listener.get() is terminal and terminal_console().is_terminal


def say(text: str) -> None:
    """Say a line, or a few."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


def note(text: str) -> None:
    """Say what a user may have to know, though it stops nothing. On a terminal it goes to standard error, out of the
    way of results.
    """
    _aside(f"note: {text}")


def _aside(text: str) -> None:
    if _listener.get() is terminal:
        with _written():
            print(text, file=sys.stderr)
    else:
        say(text)


def remark(text: str) -> None:
    """Say a line beside a command's result: on a terminal it goes to standard error."""
    _aside(text)


def show(renderable: RenderableType, width: int | None = None) -> None:
    """Show a table or another thing that ``rich`` draws; a listener gets it as text. ``width``: what it takes where
    there is no terminal that has one.
    """
    listener = _listener.get()
    if listener is terminal and (width is None or terminal_console().is_terminal):
        with _written():
            terminal_console().print(renderable)
    elif listener is not None:
        from rich.console import Console

        drawn = Console(file=io.StringIO(), width=width or _TABLE_WIDTH, highlight=False)
        with drawn.capture() as text:
            drawn.print(renderable)
        listener(text.get().rstrip("\n"))


class ProgressLine:
    """Loss terms and tokens/s: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps = steps
        self._bar = _live_bar("bending", steps, done)

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, terms: dict[str, float], tokens_per_second: float) -> None:
        """Show one optimizer step."""
        values = (
            f"loss {loss:+.3f}  "
            + "  ".join(f"{n} {v:.3f}" for n, v in terms.items())
            + f"  {tokens_per_second:,.0f} tok/s"
        )
        if self._bar:
            self._bar.update(completed=step, text=values)
        else:
            say(f"step {step}/{self.steps}  {values}")


class CountLine:
    """How many of many things are done and how long the rest will take: a live bar on a terminal, else a line
    every ``seconds`` and at the end of a part, out of the way of results. ``kinds``: how many of each are to be done,
    where some take longer.
    ``stays``: the bar remains on the terminal when all is done.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        seconds: float = 15.0,
        kinds: Mapping[str, int] | None = None,
        stays: bool = True,
    ) -> None:
        self.what, self.total, self.done = what, total, done
        self._seconds, self._last = seconds, time.monotonic()
        self._said_at, self._said = self._last, done
        self._open = Counter({"": total - done} if kinds is None else kinds)
        self._spent: dict[str, tuple[float, int]] = {}
        self._bar = _live_bar(what, total, done, stays)

    def __enter__(self) -> CountLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, more: int, kind: str = "") -> None:
        """Add to the total what nobody knew of before."""
        self.total += more
        self._open[kind] += more
        if self._bar:
            self._bar.update(total=self.total)

    def advance(self, part: str, count: int = 1, kind: str = "") -> None:
        """Count ``count`` things of ``part`` as done."""
        self.done += count
        now = time.monotonic()
        seconds, things = self._spent.get(kind, (0.0, 0))
        self._spent[kind] = seconds + now - self._last, things + count
        self._open[kind] -= count
        self._last = now
        if self._bar:
            self._bar.update(completed=self.done, text=part, left=self._left().strip())
        elif time.monotonic() - self._said_at >= self._seconds:
            self.end_part(part)

    def end_part(self, part: str) -> None:
        """Say how far it is, if anything is done since that was last said."""
        if self._bar or self._said == self.done:
            return
        self._said, self._said_at = self.done, time.monotonic()
        _aside(f"{self.what} {self.done}/{self.total}  {part}{self._left()}")

    def _left(self) -> str:
        """By the pace of each kind; of a kind that has not begun nobody knows it, so that it is over that long."""
        if self.done >= self.total or not self._spent:
            return ""
        left = {kind: count for kind, count in self._open.items() if count > 0}
        pace = {kind: seconds / things for kind, (seconds, things) in self._spent.items() if things}
        seconds = sum(count * pace.get(kind, 0.0) for kind, count in left.items())
        over = "over " if left.keys() - pace.keys() else ""
        if over and seconds < 1:
            return ""
        return f"  {over}{seconds / 60:.0f} min left" if seconds >= 90 else f"  {over}{seconds:.0f} s left"


@contextmanager
def busy(what: str, seconds: float = 30.0) -> Iterator[None]:
    """A wait whose length nobody knows: a moving line with the time on a terminal, which goes when it is over;
    elsewhere a line afterwards, if it took as long as ``seconds``, out of the way of results.
    """
    began, bar = time.monotonic(), _live_bar(what, None, 0, stays=False)
    if bar:
        bar.start()
    try:
        yield
    finally:
        if bar:
            bar.stop()
    if not bar and (took := time.monotonic() - began) >= seconds:
        _aside(f"{what}: {took:.0f} s")


T = TypeVar("T")


def counted(what: str, things: Collection[T]) -> Generator[T, None, None]:
    """``things``, with a bar that counts them on a terminal, which goes when they are done; elsewhere a line now and
    then.
    """
    with CountLine(what, len(things), stays=False) as progress:
        for thing in things:
            yield thing
            progress.advance("")


class _LiveBar:
    """A line with count, time and time left, and a text behind them. A terminal has one set of such lines: what starts
    while another one is drawn, as a validation does in a training, is a line below it until it is over.
    """

    _drawn: ClassVar[Progress | None] = None

    def __init__(self, what: str, total: int | None, done: int, stays: bool) -> None:
        self._what, self._total, self._done, self._stays = what, total, done, stays
        self._is_first = False

    def start(self) -> None:
        """Draw it."""
        if _LiveBar._drawn is None:
            self._is_first = True
            _LiveBar._drawn = _bars()
            with _written():
                _LiveBar._drawn.start()
        self._lines = _LiveBar._drawn
        self._task = self._lines.add_task(self._what, total=self._total, completed=self._done, text="", left=None)

    def stop(self) -> None:
        """Leave its last state, or take it away."""
        if not self._is_first or not self._stays:
            self._lines.remove_task(self._task)
        if self._is_first:
            _LiveBar._drawn = None
            with _written():
                self._lines.stop()

    def update(
        self, total: int | None = None, completed: int | None = None, text: str | None = None, left: str | None = None
    ) -> None:
        """Change what is not None. ``left``: the time left in words, where ``rich`` is not to estimate it."""
        self._lines.update(self._task, total=total, completed=completed)
        if text is not None:
            self._lines.update(self._task, text=text)
        if left is not None:
            self._lines.update(self._task, left=left)


def _live_bar(what: str, total: int | None, done: int, stays: bool = True) -> _LiveBar | None:
    """A bar; None where no terminal is."""
    return _LiveBar(what, total, done, stays) if is_terminal() else None


def _bars() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Count(MofNCompleteColumn):
        """Nothing where nobody knows how many there are."""

        def render(self, task: Task) -> Text:
            return Text("") if task.total is None else super().render(task)

    class Left(Remaining):
        """Says which of the two times it is; nothing before there is a pace. ``rich`` forgets the pace where a total
        grows, so who counts such things says the time left itself.
        """

        def render(self, task: Task) -> Text:
            if task.fields["left"] is not None:
                return Text(task.fields["left"])
            time_left = "" if task.total is None else super().render(task).plain
            return Text(f"{time_left} left" if any(map(str.isdigit, time_left)) else "")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        Count(),
        TimeElapsedColumn(),
        Left(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    return Progress(*columns, console=terminal_console())


def hush() -> None:
    """Silence notices of other libraries that say nothing to a user, and only those, for the rest of the process.

    Progress bars of downloads and loading stay where there is a terminal to draw them on.
    """
    _ignore_noise()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def hushed() -> Iterator[None]:
    """As :func:`hush` inside; away from a terminal without progress bars of models being loaded either."""
    logger = logging.getLogger(_CPU_KERNEL_LOGGER)
    kept = list(logger.filters)
    with warnings.catch_warnings(), _without_bars(_listener.get() is not terminal):
        _ignore_noise()
        try:
            yield
        finally:
            logger.filters[:] = kept


@contextmanager
def _without_bars(wanted: bool) -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    switch = wanted and transformers_logging.is_progress_bar_enabled()
    if switch:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if switch:
            transformers_logging.enable_progress_bar()


_CPU_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"


def _ignore_noise() -> None:
    # peft asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # bitsandbytes looks on the hub for a CPU kernel of inference, which training must not use: it has no backward.
    logging.getLogger(_CPU_KERNEL_LOGGER).addFilter(_not_about_the_hub_kernel)


def _not_about_the_hub_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
