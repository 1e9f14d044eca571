"""What the user is told on the terminal: lines, and the progress of a run."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(text: str) -> None:
    """Print a line for the user as it is: paths keep their brackets, and a command to copy is not wrapped."""
    console.print(text, markup=False, emoji=False, soft_wrap=True)


class ProgressLine:
    """Loss terms and tokens/s: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps = steps
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[values]}"), console=console)
            self._task = self._bar.add_task("bending", total=steps, completed=done, values="")

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, terms: dict[str, float], tokens_per_second: float) -> None:
        """Show one optimizer step."""
        values = f"loss {loss:+.3f}  " + "  ".join(f"{n} {v:.3f}" for n, v in terms.items()) + f"  {tokens_per_second:,.0f} tok/s"
        if self._bar:
            self._bar.update(self._task, completed=step, values=values)
        else:
            say(f"step {step}/{self.steps}  {values}")
