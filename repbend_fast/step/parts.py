"""The parts of a model that the passes of a step need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from repbend_fast.models.decoder import Decoder, Head


@dataclass(frozen=True)
class ModelParts:
    """``model`` is the PEFT model, ``decoder`` and ``head`` are inside it; ``device`` is where its blocks compute."""

    model: Any
    decoder: Decoder
    head: Head | None
    device: torch.device
    autocast: torch.dtype | None

    def autocasting(self) -> AbstractContextManager[Any]:
        """The autocast context of both passes."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
