"""Saved moments go back to where the optimizer keeps them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from repbend_fast.config.schema import TrainingConfig
from repbend_fast.training import optimizer as module
from repbend_fast.training.optimizer import build_optimizer, load_moments


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


def test_the_number_of_launches_is_the_device_s_choice_not_the_checkpoint_s(monkeypatch) -> None:
    """Moments that were saved on a CPU go on in a fused optimizer, and back."""
    config = TrainingConfig(optimizer="adamw", learning_rate=1e-2)

    def stepped(fused: bool | None, grad: Tensor, saved: dict[str, Any] | None = None) -> tuple[Any, Tensor]:
        monkeypatch.setattr(module, "_is_fused", lambda parameters: fused)
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = build_optimizer([parameter], config)
        if saved is not None:
            load_moments(optimizer, copy.deepcopy(saved), config)
        assert [group["fused"] for group in optimizer.param_groups] == [fused]
        parameter.grad = grad.clone()
        optimizer.step()
        assert int(optimizer.state[parameter]["step"]) == (1 if saved is None else 2)
        return optimizer, parameter.detach()

    once, then = torch.linspace(2, -1, 9), torch.linspace(-1, 3, 9)
    for first, second in ((None, True), (True, None)):
        saved = stepped(first, once)[0].state_dict()
        _, found = stepped(second, then, saved)
        assert torch.allclose(found, stepped(first, then, saved)[1], rtol=1e-6)
        assert not torch.allclose(found, stepped(first, then)[1], rtol=1e-4)


def test_one_launch_for_all_on_a_gpu_alone(monkeypatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    assert module._is_fused(parameters) is None
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert module._is_fused(parameters) is True
