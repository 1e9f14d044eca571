"""Saved moments go back to where the optimizer keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repbend_fast.config.schema import TrainingConfig
from repbend_fast.training.optimizer import load_moments


class Paging(torch.optim.Optimizer):
    """As bitsandbytes' paged optimizers: large moments in memory of their own, all of them ordinary tensors after
    loading.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.handed_out: list[Tensor] = []
        self.expects_paging = True

    def get_state_buffer(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = torch.zeros(parameter.shape, dtype=dtype)
        buffer.is_paged = parameter.numel() >= 100  # type: ignore[attr-defined]
        self.handed_out.append(buffer)
        return buffer

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes', which moves to the device unless it is told not to."""
        assert not move_to_device or not self.expects_paging
        super().load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        """Not called here."""


def test_loaded_moments_are_paged_again() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (10, 200)]
    saved = {
        "state": {
            i: {"step": 3, "state1": torch.full((p.numel(),), 7.0), "state2": torch.arange(float(p.numel()))}
            for i, p in enumerate(parameters)
        },
        "param_groups": [{"lr": 0.5, "params": [0, 1]}],
    }
    optimizer = Paging(parameters)
    load_moments(optimizer, saved, TrainingConfig(optimizer="paged_adamw_8bit", learning_rate=1e-3))
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        for name in ("state1", "state2"):
            assert any(state[name] is buffer for buffer in optimizer.handed_out)
            assert torch.equal(state[name], saved["state"][i][name])
        assert state["step"] == 3
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_other_optimizers_keep_what_they_loaded() -> None:
    parameter = torch.nn.Parameter(torch.zeros(200))
    optimizer = Paging([parameter])
    optimizer.expects_paging = False
    saved = {"state": {0: {"state1": torch.ones(200)}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    load_moments(optimizer, saved, TrainingConfig(optimizer="adamw_8bit"))
    assert optimizer.handed_out == []
