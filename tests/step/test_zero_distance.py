"""At LoRA's start adapted and reference pass agree to the bit: S, U and K are 0.0 with a zero gradient; only C starts
the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BLOCKS,
    FAMILIES,
    LAYOUTS,
    adapted_model,
    objective_config,
    ragged_batch,
    run_step,
    runner_on,
    tiny_model,
    wrap,
)

from repbend_fast.config.schema import LoraConfig, MemoryConfig, ModelConfig
from repbend_fast.data.records import Batch
from repbend_fast.models import load_model, quantize_nf4
from repbend_fast.step.levers import Levers

DROPOUT = LoraConfig(r=4, alpha=8, dropout=0.05)
KINDS = ("float32", "bfloat16", "nf4 in place", "nf4 loaded", "nf4 float32")
CONFIG = objective_config(alpha_mode="all", loss_mode="prompt_response")


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models with a fresh adapter, by kind."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    in_place = {
        name: tiny_model(dtype=dtype)
        for name, dtype in (("nf4 in place", torch.bfloat16), ("nf4 float32", torch.float32))
    }
    for model in in_place.values():
        quantize_nf4(model, model.dtype, True, torch.device("cpu"))
    bases = in_place | {
        "float32": tiny_model(),
        "bfloat16": tiny_model(dtype=torch.bfloat16),
        "nf4 loaded": load_model(ModelConfig(name=str(folder), quantization="nf4", device="cpu")),
    }
    return {name: wrap(base, lora=DROPOUT, trained=False) for name, base in bases.items()}


def _assert_zero(results, names=("safe", "unsafe")) -> None:
    for name in names:
        assert float(results[name].terms[name]) == 0.0
        for layer, distance in results[name].layers[name].items():
            assert float(distance) == 0.0, f"{name}: hidden state {layer}"


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize(
    "memory", [{}, {"piece_tokens": 25}, {"checkpoint_blocks": "all"}], ids=["one piece", "split", "checkpointed"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_exactly_zero(starts, kind, memory, packing) -> None:
    results, gradient = run_step(starts[kind], CONFIG, memory=MemoryConfig(packing=packing, **memory))
    _assert_zero(results)
    assert sorted(results["safe"].layers["safe"]) == list(range(1, BLOCKS + 1))
    assert sorted(results["unsafe"].layers["unsafe"]) == list(CONFIG.window)
    assert abs(float(results["retain"].terms["kl"])) <= 1e-6
    assert float(results["unsafe"].terms["cosine"]) > 0.01
    assert any(g.abs().max() > 0 for name, g in gradient.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ["safe", "unsafe", "kl", "cosine"])
def test_only_the_cosine_has_a_gradient(starts, kind, term) -> None:
    weights = {name: 1.0 if name == term else 0.0 for name in ("safe", "unsafe", "kl", "cosine")}
    _, gradient = run_step(starts[kind], objective_config(**weights))
    largest = max(float(g.abs().max()) for g in gradient.values())
    assert (largest > 1e-5) if term == "cosine" else (largest == 0.0)


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pair_rows_of_the_shared_prompt_are_zero(starts, kind, packing) -> None:
    """Answers that differ have a distance; the last prompt token, read alone, has none."""
    memory = MemoryConfig(packing=packing)
    only_prompt = objective_config(pair=1.0, pair_positions=1)
    results, _ = run_step(starts[kind], only_prompt, memory=memory, only="unsafe")
    _assert_zero(results, names=("unsafe",))
    assert float(results["unsafe"].terms["pair"]) == 0.0
    with_answers = objective_config(pair=1.0, unsafe=0.0, cosine=0.0)
    results, gradient = run_step(starts[kind], with_answers, memory=memory, only="unsafe")
    assert float(results["unsafe"].terms["pair"]) > 0.01
    assert all(torch.isfinite(g).all() for g in gradient.values())
    assert max(float(g.abs().max()) for g in gradient.values()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_at_zero_in_bfloat16(family) -> None:
    model = adapted_model(family, torch.bfloat16, lora=DROPOUT, trained=False)
    for packing in LAYOUTS:
        results, _ = run_step(model, CONFIG, memory=MemoryConfig(packing=packing, piece_tokens=40))
        _assert_zero(results)


def test_autocast_starts_at_zero() -> None:
    from repbend_fast.objectives import build_objective

    model = adapted_model(lora=DROPOUT, trained=False)
    runner = runner_on(model, Levers(packing="on"), autocast=torch.bfloat16)
    streams = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)
    _assert_zero({stream.name: runner.backward(stream, dropout_seed=0) for stream in streams})


def test_a_trained_adapter_has_distances(starts) -> None:
    results, _ = run_step(adapted_model(lora=DROPOUT), CONFIG)
    for name in ("safe", "unsafe"):
        assert all(float(v) > 0.01 for v in results[name].layers[name].values())
    assert float(results["retain"].terms["kl"]) > 1e-3


def test_a_batch_of_equal_prompts_still_has_finite_gradients(starts) -> None:
    batch = ragged_batch()
    twice = Batch(batch.safe, (batch.unsafe[0],) * 2, (batch.pairs[0],) * 2, batch.retain)
    for kind in KINDS:
        _, gradient = run_step(starts[kind], CONFIG, twice)
        assert all(torch.isfinite(g).all() for g in gradient.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_moves_the_adapter_alone(starts, kind) -> None:
    model = starts[kind]
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in adapter}
    before = {n: p.detach().clone() for n, p in adapter.items()}
    assert adapter
    assert all("lora_" in n for n in adapter)
    run_step(model, CONFIG)
    optimizer = torch.optim.SGD(adapter.values(), lr=0.1)
    optimizer.step()
    try:
        assert any(not torch.equal(p, before[n]) for n, p in adapter.items())
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
        results, _ = run_step(model, CONFIG)
        assert float(results["unsafe"].terms["unsafe"]) > 0
    finally:
        for name, parameter in adapter.items():
            parameter.data.copy_(before[name])
