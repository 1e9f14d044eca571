"""A mutant: a fault put into the code, and the tests that have to fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``tests`` are pytest's arguments.

    With ``interpret`` Triton's kernels run on the CPU. ``unseen`` says why no test on a machine without a GPU, or with
    one, can fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpret: bool = False
    unseen: str | None = None


KERNELS = "kernels/repbend_kernels"
MODELS = "repbend_fast/models"
