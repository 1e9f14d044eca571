"""Passes on merged and rounded weights: values, the straight-through gradient, and nothing of it left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from model_picture import changed, picture
from objective_runs import BATCH, BLOCKS, CONFIGS, precise_model, run_objective
from shape_recipes import recipe
from tiny_models import WINDOW, adapted_model, flat, gradients, runner_on, tiny_model, wrap
from torch import Tensor, nn
from torch.nn.functional import linear

from repbend_fast.config.schema import ModelConfig
from repbend_fast.models import find_decoder, load_model, reference_model
from repbend_fast.models.layers.rounded import nf4, rounded_weights
from repbend_fast.models.layers.rounded_passes import _weights, rounded_passes, rounding_bytes
from repbend_fast.objectives import Distance, Stream
from repbend_fast.planning.peaks import Peak, PeakMeter
from repbend_fast.planning.planner import Planner
from repbend_fast.planning.shapes import shape_model
from repbend_fast.planning.tracker import MemoryTracker
from repbend_fast.step.levers import Levers

IDS = torch.tensor([[1, 9, 11, 3, 60, 61, 7], [1, 5, 5, 80, 41, 12, 33]])


def to_grid(weight: Tensor, place: object) -> Tensor:
    """A coarse format that works in float64 too."""
    return (weight * 16).round() / 16


def to_nf4(weight: Tensor, place: object) -> Tensor:
    return nf4(weight)


def lora_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")]


@contextmanager
def straight_through(model: Any) -> Iterator[None]:
    """The plain expression: m = W + s·BA (W where the adapter is off), and m + (Q(m) − m), the bracket a constant."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        weight = layer.get_base_layer().weight
        if not layer.disable_adapters:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = weight + layer.scaling["default"] * b @ a
        return linear(x, weight + (to_grid(weight, None) - weight).detach(), layer.get_base_layer().bias)

    layers = lora_layers(model)
    others = [m for m in find_decoder(model).layers.modules() if type(m) is nn.Linear]
    plain = {id(layer.get_base_layer()) for layer in layers}
    plain |= {id(part) for layer in layers for d in (layer.lora_A, layer.lora_B) for part in d.values()}
    for layer in layers:
        layer.forward = partial(forward, layer)
    for other in others:
        if id(other) not in plain:
            other.forward = lambda x, other=other: linear(x, to_grid(other.weight, None), other.bias)
    try:
        yield
    finally:
        for module in (*layers, *others):
            vars(module).pop("forward", None)


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("rounding", [to_grid, to_nf4], ids=["grid", "nf4"])
def test_values_are_those_of_merged_and_rounded_weights(rounding: Any) -> None:
    model = adapted_model()
    blocks, before = find_decoder(model).layers, picture(model)
    with torch.no_grad():
        plain = logits(model)
        with rounded_weights(model, blocks, rounding, adapter=True):
            merged = logits(model)
        with rounded_weights(model, blocks, rounding, adapter=False):
            base = logits(model)
        with rounded_passes(blocks, rounding):
            found = logits(model)
            with reference_model(model):
                assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), plain)
    assert_matches(found, merged, tolerance=1e-5, name="logits")
    assert relative_l2(plain, merged) > 1e-3
    assert relative_l2(base, merged) > 1e-3
    assert changed(before, picture(model)) == []
    with pytest.raises(RuntimeError, match="broken"), rounded_passes(blocks, rounding):
        raise RuntimeError("broken")
    assert changed(before, picture(model)) == []


@pytest.mark.parametrize("name", ["circuit_breaker", "npo", "crl"])
def test_the_gradient_is_straight_through_however_a_stream_is_cut(name: str) -> None:
    model, config = precise_model(), CONFIGS[name]
    with straight_through(model):
        _, expected = run_objective(model, config)
    _, plain = run_objective(model, config)
    for pieces, packing, recomputed in ((None, "off", 0), (24, "on", BLOCKS), (1, "off", 0)):
        with rounded_passes(find_decoder(model).layers, to_grid):
            _, got = run_objective(model, config, piece_tokens=pieces, packing=packing, checkpoint_blocks=recomputed)
        assert_matches(flat(got), flat(expected), tolerance=1e-8, name="gradient")
    for wrong in (torch.zeros_like(flat(expected)), -flat(expected), flat(plain)):
        assert relative_l2(wrong, flat(expected)) > 1e-3
    _, again = run_objective(model, config)
    assert torch.equal(flat(again), flat(plain))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_the_distance_is_zero_where_the_adapter_is_at_its_start(precision: str, tmp_path: Any) -> None:
    if precision == "nf4":
        tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
        base = load_model(ModelConfig(name=str(tmp_path), quantization="nf4", device="cpu"))
    else:
        base = tiny_model(dtype=getattr(torch, precision))
    model = wrap(base, trained=False)
    runner = runner_on(model, Levers({}, 0, packing="off"), uses_head=False)
    layers = tuple(range(1, WINDOW[-1] + 1))
    stream = Stream("s", BATCH.retain, (Distance("d", layers, tuple((0, len(s)) for s in BATCH.retain), 1.0, 1.0),))
    plain = runner.reference_rows(stream)
    first = [rows for part in plain for kept in part for rows in kept.values()]
    with rounded_passes(runner.decoder.layers, to_nf4):
        result = runner.backward(stream, dropout_seed=1)
        second = [rows for part in runner.reference_rows(stream) for kept in part for rows in kept.values()]
    assert float(result.loss) == 0.0
    assert all(float(value) == 0.0 for value in result.layers["d"].values())
    assert float(flat(gradients(model)).abs().max()) == 0.0
    assert precision == "nf4" or any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_takes_is_no_more_than_said(dtype: torch.dtype) -> None:
    model = adapted_model(dtype=dtype)
    blocks = find_decoder(model).layers
    layer = max(lora_layers(model), key=lambda one: one.get_base_layer().weight.numel())
    with MemoryTracker() as tracker:
        _weights(layer.get_base_layer(), layer, to_nf4, None)  # type: ignore[arg-type]
    assert 0.4 * rounding_bytes(blocks) < tracker.peak <= rounding_bytes(blocks)


@pytest.mark.parametrize("every", [None, 2])
def test_a_plan_adds_what_the_largest_layer_takes(every: int | None, tmp_path: Any) -> None:
    config = recipe(tmp_path, *([] if every is None else [f"training.nf4_every={every}"]), layers=4)
    model = shape_model(config.model, config.lora, (2,))
    meter = PeakMeter(model, config, (2,), torch.device("cpu"), "off")
    assert meter.rounding_bytes == (0 if every is None else 3 * 128 * 128 * (6 * 4 + 4))
    stub = SimpleNamespace(meter=SimpleNamespace(scratch=lambda *_: 0, rounding_bytes=meter.rounding_bytes))
    peak = SimpleNamespace(head_rows=0)
    assert Planner._with_levers(stub, Peak(1000), peak, 1, Levers()) == 1000 + meter.rounding_bytes  # type: ignore[arg-type]
