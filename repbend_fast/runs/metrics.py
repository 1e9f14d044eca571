"""``metrics.jsonl`` of a run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from repbend_fast.runs.folder import finite, saving, write_text


class MetricsLog:
    """Appends one JSON object per line; each line is flushed, so an interrupted run keeps all of them."""

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        """``last_step``: keep an existing log up to this step and append (a resumed run); None starts anew."""
        self.path = path
        kept = [] if last_step is None else [line for line in _lines(path) if _step(line) <= last_step]
        write_text(path, "".join(kept))

    def write(self, kind: str, step: int, **values: object) -> None:
        """``kind`` is ``step``, ``validation`` or ``event``. A number that is not finite is written as null: JSON has
        no other.
        """
        line = json.dumps(finite({"type": kind, "step": step} | values), allow_nan=False)
        with saving(self.path.name, self.path):
            # The folder may be removed while the run trains, which then makes it again.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def close(self) -> None:
        """Nothing is held back here; trackers (``runs/tracking.py``) may hold something."""


class NoLog(MetricsLog):
    """Of a process that is not the first of its run: nothing is written."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, **values: object) -> None:
        pass


def _lines(path: Path) -> list[str]:
    # A killed run may leave half a line, or after a power cut anything; such a line is no reason not to resume.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [line + "\n" for line in text.split("\n") if line.strip()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated device memory on CUDA, peak resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
