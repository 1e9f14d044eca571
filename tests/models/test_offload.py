"""Host memory instead of device memory: the same gradient, and what should have left the device has."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches
from tiny_models import (
    BLOCKS,
    VOCABULARY,
    WITHOUT_DROPOUT,
    adapted_model,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    runner_on,
    tiny_model,
    wrap,
)
from torch import Tensor

from repbend_fast.errors import UserError
from repbend_fast.models import Head, find_head
from repbend_fast.models.layers.offload import HostEmbedding, HostStates, host_states, offload_embedding
from repbend_fast.models.layers.packing import host_copy
from repbend_fast.objectives import build_objective
from repbend_fast.step import adapted
from repbend_fast.step.levers import Levers
from repbend_fast.step.pieces import make_piece
from repbend_fast.step.proof import check_head

CPU = torch.device("cpu")
DROPOUT = WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3})
CONFIG = objective_config(pair=0.4)


def step(model: Any, levers: Levers) -> tuple[dict[str, Tensor], Tensor]:
    model.zero_grad(set_to_none=True)
    runner = runner_on(model, levers)
    streams = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)
    terms = {name: value for s in streams for name, value in runner.backward(s, dropout_seed=4).terms.items()}
    return terms, flat(gradients(model))


def same(found: tuple[dict[str, Tensor], Tensor], expected: tuple[dict[str, Tensor], Tensor]) -> bool:
    return found[0] == expected[0] and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("blocks", [2, BLOCKS])
def test_offloaded_checkpoints_give_the_same_bits(monkeypatch, blocks) -> None:
    model = adapted_model(lora=DROPOUT)
    expected = step(model, Levers(checkpoint_blocks=blocks, packing="on"))
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    fetched: list[int] = []

    class Watched(HostStates):
        def put(self, index: int, hidden: Tensor) -> None:
            inputs.append(weakref.ref(hidden))
            super().put(index, hidden)

        def get(self, index: int) -> Tensor:
            alive.append(sum(reference() is not None for reference in inputs))
            fetched.append(index)
            return super().get(index)

    monkeypatch.setattr(adapted, "host_states", lambda wanted, device: Watched(device) if wanted else None)
    found = step(model, Levers(checkpoint_blocks=blocks, offload_checkpoints=True, packing="on"))
    assert same(found, expected)
    # safe and retain run all blocks, unsafe those below the window's end
    assert len(inputs) == sum(min(blocks, stop) for stop in (BLOCKS, 3, BLOCKS))
    assert fetched[:blocks] == list(reversed(range(blocks)))
    assert alive == [0] * len(inputs), "an input that is kept on the host is still on the device in backward"


def test_states_come_back_as_they_were() -> None:
    store = HostStates(CPU)
    states = [torch.randn(1, 3, 4, dtype=torch.bfloat16).requires_grad_(i > 0) for i in range(3)]
    for i, state in enumerate(states):
        store.put(i, state)
    for i in (2, 1, 0):
        got = store.get(i)
        assert torch.equal(got, states[i])
        assert got.dtype == torch.bfloat16
        assert got.is_leaf
        assert got.requires_grad == (i > 0)
        assert [kept.sent is not None for _, kept in sorted(store._kept.items())] == [j == i - 1 for j in range(3)]


def test_nothing_to_offload_on_the_cpu() -> None:
    assert host_states(True, CPU) is None
    assert host_states(False, torch.device("cuda")) is None
    model = adapted_model()
    runner_on(model, Levers(offload_embedding=True))
    assert not isinstance(model.get_input_embeddings(), HostEmbedding)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_an_embedding_on_the_host_is_the_same_model(family) -> None:
    """qwen3 ties its head to the embedding; gemma3 scales the embedding with a buffer."""
    model = adapted_model(family, lora=DROPOUT)
    expected = step(model, Levers(packing="on"))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama")
    offload_embedding(model)
    offload_embedding(model)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert type(model.get_input_embeddings()).__mro__[1] is HostEmbedding
    check_head(model, find_head(model))
    assert same(step(model, Levers(packing="on")), expected)


def test_rows_and_head_go_to_the_compute_device() -> None:
    """The meta device stands in for a GPU: what is computed lies there, the weights stay on the host."""
    model, meta = adapted_model(), torch.device("meta")
    offload_embedding(model)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.compute_device = meta
    rows = embedding(torch.arange(6).reshape(2, 3))
    assert (rows.device, rows.shape) == (meta, (2, 3, 64))
    assert (output(rows).device, output(rows).shape) == (meta, (2, 3, VOCABULARY))
    head = find_head(model)
    assert head.on(meta).weight.device == meta
    assert head.on(CPU).weight is head.weight
    assert {p.device for module in (embedding, output) for p in module.parameters()} == {CPU}


def test_the_head_has_left_before_backward(monkeypatch) -> None:
    model = adapted_model()
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def copied(head: Head, device: torch.device) -> Head:
        weight = head.weight.clone()
        copies.append(weakref.ref(weight))
        return Head(weight, head.bias, head.softcap)

    monkeypatch.setattr(Head, "on", copied)
    runner = runner_on(model, Levers())
    runner.parameters[-1].register_hook(
        lambda gradient: alive.append(sum(reference() is not None for reference in copies))
    )
    runner.backward(build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)[-1], dropout_seed=0)
    assert len(copies) == 1
    assert alive == [0]


def test_a_head_that_cannot_move_is_refused() -> None:
    model = adapted_model()
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"memory\.offload_embedding=true: the output head is a Linear"):
        offload_embedding(model)


META = torch.device("meta")
"""A device that gives nothing back."""


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_piece_s_ids_need_not_come_back_from_the_device(layout) -> None:
    model = tiny_model("llama")
    offload_embedding(model)
    sequences = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)[0].sequences
    members = tuple(range(len(sequences)))
    found = make_piece(sequences, members, layout, META).input_ids
    expected = make_piece(sequences, members, layout, CPU).input_ids
    assert found.device == META
    assert torch.equal(host_copy(found), expected)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(found), embedding(expected))
    with pytest.raises(NotImplementedError, match="meta"):
        embedding(found.clone())


@pytest.mark.gpu
def test_offload_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu = torch.device("cuda")
    plain, small = (wrap(tiny_model().to(gpu), lora=DROPOUT).to(gpu) for _ in range(2))
    expected, got = step(plain, Levers(checkpoint_blocks=BLOCKS)), step(small, Levers({}, BLOCKS, True, True))
    assert {p.device.type for p in small.get_input_embeddings().parameters()} == {"cpu"}
    assert small.get_input_embeddings().weight.is_pinned()
    for name, value in expected[0].items():
        assert_matches(got[0][name], value, tolerance=1e-6, name=name)
    assert_matches(got[1], expected[1], tolerance=1e-5, name="gradient")


@pytest.mark.gpu
def test_offloaded_checkpoints_leave_the_gpu() -> None:
    """With wide states and many blocks the peak falls by most of the inputs that are not on the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu, blocks, shape = torch.device("cuda"), 24, (1, 4096, 512)
    layers = torch.nn.ModuleList(torch.nn.Linear(512, 512, device=gpu) for _ in range(blocks))
    size = 4096 * 512 * 4

    def peak(store: HostStates | None) -> int:
        from repbend_fast.models.layers.truncated import TappedBlock

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        hidden = torch.ones(shape, device=gpu, requires_grad=True)
        for i, layer in enumerate(layers):
            hidden = TappedBlock(layer, i, lambda _, h: h, last=False, recompute=True, offload=store)(hidden)
        hidden.sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(None) - peak(HostStates(gpu)) > 0.7 * blocks * size
