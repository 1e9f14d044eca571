"""The parts of a model that the passes of a step need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import Decoder, Head
from repbend_fast.models.layers.switches import AdapterSwitch, adapter_switches


@dataclass(frozen=True)
class ModelParts:
    """``model`` is the PEFT model, ``decoder`` and ``head`` are inside it; ``device`` is where its blocks compute.

    ``units``: the length that counts as 1 at each hidden state where a term's unit is "reference" (``step/units.py``).
    ``lockstep``: a pass needs every process of the run, so that none may run one that the others do not.
    """

    model: CausalLM
    decoder: Decoder
    head: Head | None
    device: torch.device
    autocast: torch.dtype | None
    units: dict[int, float] = field(default_factory=dict)
    lockstep: bool = False

    @cached_property
    def switches(self) -> list[AdapterSwitch]:
        """Layers that the reference pass switches: looked for once, since every piece has such a pass and a prepared
        model keeps its modules.
        """
        return adapter_switches(self.model)

    def unit(self, layer: int, power: int) -> float:
        """The unit of hidden state ``layer`` to the ``power`` that a term is divided by; 1 for the power 0."""
        if not power:
            return 1.0
        if layer not in self.units:
            raise ValueError(
                f"a term counts in units of the reference, and that of hidden state {layer} was not measured "
                "(step/units.py)"
            )
        return float(self.units[layer] ** power)

    def autocasting(self) -> AbstractContextManager[object]:
        """The autocast context of both passes."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
