"""A stream is run and differentiated without the host waiting for the device once: a GPU then never stands idle between
pieces.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from tiny_models import FAMILIES, LAYOUTS, adapted_model, objective_config, ragged_batch, runner_on

from repbend_fast.config.schema import LoraConfig, MemoryConfig
from repbend_fast.models import find_decoder
from repbend_fast.objectives import build_objective
from repbend_fast.step.levers import levers_of

MEMORY: dict[str, dict[str, Any]] = {
    "one piece": {},
    "split": {"piece_tokens": 25},
    "recomputed": {"checkpoint_blocks": "all"},
}


def syncs_of(family: str, memory: MemoryConfig, **objective: Any) -> list[str]:
    model = adapted_model(family, lora=LoraConfig(r=3, alpha=6, dropout=0.1))
    config = objective_config(pair=0.1, **objective)
    runner = runner_on(model, levers_of(memory, model), uses_head=True)
    streams = build_objective(config, find_decoder(model).num_blocks).streams(ragged_batch(), 0)
    assert [stream.name for stream in streams] == ["safe", "unsafe", "retain"]
    with HostSyncs() as syncs:
        for stream in streams:
            runner.backward(stream, dropout_seed=3)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in runner.parameters)
    return syncs.found


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
def test_no_stream_waits(memory: str, packing: str) -> None:
    assert syncs_of("llama", MemoryConfig(packing=packing, **MEMORY[memory])) == []


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_no_family_waits(family: str) -> None:
    assert syncs_of(family, MemoryConfig(packing="off", piece_tokens=25)) == []


@pytest.mark.parametrize("loss_mode", ["prompt_last", "prompt_all", "prompt_response", "response_all"])
def test_no_loss_mode_waits(loss_mode: str) -> None:
    assert syncs_of("llama", MemoryConfig(), loss_mode=loss_mode) == []


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: x.unique(), "_unique2"),
    ],
)
def test_the_recorder_sees_every_kind_of_wait(wait: Any, name: str) -> None:
    x = torch.arange(4.0, requires_grad=True)
    with HostSyncs() as syncs:
        (x * 2).sum().backward()
        assert syncs.found == []
        wait(x.detach())
    assert [line.split()[0] for line in syncs.found] == [name]
    assert "test_host_syncs.py" in syncs.found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("packing", LAYOUTS)
def test_cuda_itself_sees_no_wait(packing: str) -> None:
    """CUDA's own debug mode also sees copies from memory that is not pinned."""
    model = adapted_model("llama", lora=LoraConfig(r=3, alpha=6, dropout=0.1)).to("cuda")
    runner = runner_on(model, levers_of(MemoryConfig(packing=packing), model), uses_head=True)
    streams = build_objective(objective_config(pair=0.1), find_decoder(model).num_blocks).streams(ragged_batch(), 0)
    for stream in streams:
        runner.backward(stream, dropout_seed=3)  # kernels are compiled and memory is allocated, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stream in streams:
            runner.backward(stream, dropout_seed=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
