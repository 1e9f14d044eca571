"""What of a run is exported, in what form, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KINDS = ("merged", "adapter", "gguf")


@dataclass(frozen=True)
class Request:
    """``kind``: one of ``KINDS``. ``gguf_type``: of a GGUF file's weights; None takes that of ``model.dtype``.
    ``bound``: on the check's KL; None takes that of what is written.
    """

    folder: Path
    out: Path
    kind: str = "merged"
    gguf_type: str | None = None
    check: bool = True
    bound: float | None = None
