"""Records where a computation makes the host wait for the device: values read into Python, and shapes that depend on
values.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repbend_fast.training.trainer import Trainer

TORCH = str(Path(torch.__file__).parent)
OPTIMIZER = str(Path(torch.optim.__file__).parent)
# On a GPU each of these waits until everything before it has run; on the CPU they can still be seen.
WAITING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "allclose",
)


class HostSyncs(TorchDispatchMode):
    """While entered, ``found`` collects one line per wait: the op and the innermost frames that led to it.

    An index by a bool mask shows as the ``nonzero`` inside it. torch's optimizers keep their step counts on the host
    and read them there, which waits for nothing: those are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or masked:
            frames = traceback.extract_stack()[:-1]
            if not any(frame.filename.startswith(OPTIMIZER) for frame in frames):
                places = [
                    f"{frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(TORCH)
                ]
                self.found.append(f"{name} at {' < '.join(reversed(places[-4:]))}")
        return function(*args, **(kwargs or {}))


def watched_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Where each training step from here on waits for the device, filled as steps run."""
    plain = Trainer._train_step
    waits: list[list[str]] = []

    def watched(trainer: Trainer, *arguments: Any) -> None:
        with HostSyncs() as syncs:
            plain(trainer, *arguments)
        waits.append(syncs.found)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    return waits
