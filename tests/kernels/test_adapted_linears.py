"""Adapted layers as one function: each layer's numbers as ``lora_down`` and ``lora_up`` around a product give them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from kernel_compare import TOLERANCE, assert_matches, relative_l2, spread, strided
from repbend_kernels import lora_down, lora_up
from repbend_kernels.blocks import AdaptedLinear, AdaptedLinears, made_linear
from test_low_rank import stub_kernels
from test_shared_down import (
    CASES,
    EXACT,
    INNER,
    PLACE,
    ROWS,
    SCALING,
    SUBSETS,
    P,
    assert_subsets_alike,
    hashes_on,
    in_float64,
    leaves,
    many_parts,
)
from torch import Tensor

Leaves = dict[str, Tensor]
ALONE = "alone, r 16"
BATCH = (1, ROWS)
FP32 = torch.float32
__all__ = ["many_parts"]


@dataclass(frozen=True)
class _Weights:
    """As a 4-bit layer gives its weight: made at each call."""

    of: Tensor

    def __call__(self, dtype: torch.dtype) -> Tensor:
        return self.of.to(dtype, copy=True)


def of_case(case: str, device: torch.device) -> Leaves:
    found = leaves("three, r 16" if case == ALONE else case, device)
    if case == ALONE:
        found = {name: leaf for name, leaf in found.items() if name == "x" or name.endswith("0")}
    return found | {"bias0": spread((found["w0"].shape[0],), found["x"].dtype, device, 50)}


def count_of(of: Leaves) -> int:
    return sum(name.startswith("w") for name in of)


def linears(of: Leaves, p: float = P) -> AdaptedLinears:
    layers = [
        AdaptedLinear(_Weights(of[f"w{i}"]), of.get(f"bias{i}"), of[f"a{i}"], of[f"b{i}"], SCALING)
        for i in range(count_of(of))
    ]
    return AdaptedLinears(layers, PLACE, p)


def trained(of: Leaves, frozen: tuple[str, ...] = ()) -> Leaves:
    """The same leaves, those that may be trained fresh ones that require a gradient."""
    return {
        name: leaf.detach().requires_grad_(name not in frozen)
        if name[0] == "x" or (name[0] in "ab" and name[1:].isdigit())
        else leaf
        for name, leaf in of.items()
    }


def found_of(given: Leaves, outputs: list[Tensor]) -> Leaves:
    torch.autograd.backward(outputs, [given[f"grad{i}"].view_as(y) for i, y in enumerate(outputs)])
    found = {f"y{i}": y.detach().view(ROWS, -1) for i, y in enumerate(outputs)}
    return found | {name: leaf.grad for name, leaf in given.items() if leaf.is_leaf and leaf.grad is not None}


def joint(of: Leaves, implementation: str, frozen: tuple[str, ...] = (), dropout: bool = True) -> Leaves:
    given = trained(of, frozen)
    hashes = hashes_on(of["x"].device) if dropout else None
    outputs = linears(given)(given["x"].view(*BATCH, INNER), hashes, implementation=implementation)
    return found_of(given, list(outputs))


def apart(of: Leaves, implementation: str, dropout: bool = True) -> Leaves:
    """Each layer by an op of its own for everything that is not shared."""
    given, outputs = trained(of), []
    hashes = hashes_on(of["x"].device) if dropout else None
    a = [given[f"a{i}"] for i in range(count_of(of))]
    x, downs = lora_down(given["x"] * 1, a, hashes, PLACE, P, implementation=implementation)
    for i, down in enumerate(downs):
        y = made_linear(x, of.get(f"bias{i}"), _Weights(of[f"w{i}"]))
        factor = SCALING / (1 - P) if dropout else SCALING
        outputs.append(lora_up(y, down, given[f"b{i}"], factor, implementation=implementation))
    return found_of(given, outputs)


@pytest.mark.parametrize("case", [*CASES, ALONE])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "none"])
def test_values_and_gradients(implementation, device, case, dropout) -> None:
    of = of_case(case, device)
    got = joint(of, implementation, dropout=dropout)
    expected = apart(in_float64(of), "eager", dropout)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        like = of["x" if name[0] == "y" else name]
        assert got[name].dtype == like.dtype
        # Several products are added up in the gradient of x, each rounded to its dtype.
        tolerance = max(TOLERANCE[like.dtype], EXACT) * (count_of(of) if name == "x" else 1)
        assert_matches(got[name], value, tolerance=tolerance, name=name)
        for wrong in (torch.zeros_like(value), -value, value.roll(1, 0)):
            assert relative_l2(wrong, value) > 20 * tolerance or value.shape[0] == 1, name


@pytest.mark.parametrize("case", ["three, r 16", ALONE])
def test_outputs_are_those_of_layers_apart_to_the_bit(implementation, device, case) -> None:
    """A pass that keeps nothing goes another way, and B = 0 has to give the reference's bits."""
    of = of_case(case, device)
    got, expected = joint(of, implementation), apart(of, implementation)
    for name in (name for name in got if name[0] in "yb"):
        assert torch.equal(got[name], expected[name]), name


def test_eager_is_the_same_expression(device) -> None:
    of = in_float64(of_case("three, r 1, 7 and 3", device))
    got, expected = joint(of, "eager"), apart(of, "eager")
    assert all(torch.allclose(got[name], value, rtol=1e-12, atol=1e-12) for name, value in expected.items())


def test_every_subset_of_gradients(implementation, device) -> None:
    """The same gradients to the bit, whoever else has one."""
    of = of_case("three, r 1, 7 and 3", device)
    assert_subsets_alike(lambda frozen: joint(of, implementation, frozen), (*SUBSETS, ("x",)))


def test_an_output_that_nothing_used(implementation, device) -> None:
    of = of_case("three, r 1, 7 and 3", device)
    given = trained(of)
    outputs = linears(given)(given["x"], hashes_on(device), implementation=implementation)
    torch.autograd.backward([outputs[0], outputs[2]], [of["grad0"], of["grad2"]])
    assert given["b1"].grad is None
    assert not given["a1"].grad.any()
    zeroed = joint(of | {"grad1": torch.zeros_like(of["grad1"])}, implementation)
    for name in ("x", "a0", "a2", "b0", "b2"):
        assert_matches(given[name].grad, zeroed[name], tolerance=1e-6, name=name)


def test_outputs_may_be_changed_in_place(implementation, device) -> None:
    of = of_case("two, r 5 and 2", device)
    given = trained(of)
    outputs = linears(given)(given["x"].view(*BATCH, INNER), hashes_on(device), implementation=implementation)
    got = found_of(given, [y.mul_(2) for y in outputs])
    expected = joint(of | {f"grad{i}": 2 * of[f"grad{i}"] for i in range(2)}, implementation)
    for name in ("x", "a0", "a1", "b0", "b1"):
        assert torch.equal(got[name], expected[name]), name


def test_x_is_made_again(implementation, device) -> None:
    of = of_case("three, r 16", device)
    given, calls = trained(of), []
    half = given["x"].detach() / 2

    def make(kept: tuple[Tensor, ...]) -> Tensor:
        calls.append(1)
        return (kept[0] * 2).view(*BATCH, INNER)

    outputs = linears(given)(given["x"], hashes_on(device), remake=((half,), make), implementation=implementation)
    saved = outputs[0].grad_fn.saved_tensors
    assert any(kept is half or kept.data_ptr() == half.data_ptr() for kept in saved if kept is not None)
    assert all(kept is None or kept.data_ptr() != given["x"].data_ptr() for kept in saved)
    got, expected = found_of(given, list(outputs)), joint(of, implementation)
    assert calls == [1]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides(implementation, device, layout) -> None:
    of = of_case("three, r 16", device)
    got = joint(of | {name: strided(of[name], layout) for name in ("a1", "grad0")}, implementation)
    expected = joint(of, implementation)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=max(TOLERANCE[value.dtype], EXACT), name=name)


def test_launches_of_three_layers(implementation, device, monkeypatch) -> None:
    if implementation != "triton":
        pytest.skip("launches of kernels")
    launched = stub_kernels(monkeypatch)
    joint(of_case("three, r 16", device), implementation)
    assert launched.count("lora_down") == launched.count("lora_down_backward") == 1
    assert launched.count("lora_up") == launched.count("lora_up_backward") == 3


def test_an_adapter_that_changed_since_is_noticed(implementation, device) -> None:
    of = of_case("two, r 5 and 2", device)
    given = trained(of)
    outputs = linears(given)(given["x"], hashes_on(device), implementation=implementation)
    with torch.no_grad():
        given["a0"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found_of(given, list(outputs))


def test_no_second_derivatives(implementation, device) -> None:
    given = trained(of_case("two, r 5 and 2", device))
    outputs = linears(given)(given["x"], hashes_on(device), implementation=implementation)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(outputs[0].sum(), given["x"], create_graph=True)


def test_what_does_not_fit_is_refused(device) -> None:
    of = of_case("three, r 16", device)
    with pytest.raises(ValueError, match=r"b: expected shape \[O, 16\]"):
        linears(of | {"b1": of["b1"].T.contiguous()})
    with pytest.raises(TypeError, match=r"a\[2\]: expected a\[0\]'s dtype"):
        linears(of | {"a2": of["a2"].double()})
    with pytest.raises(ValueError, match="hashes"):
        linears(of)(of["x"], hashes_on(device)[1:])
    with pytest.raises(ValueError, match="expected 0 < p < 1"):
        linears(of, p=0.0)(of["x"], hashes_on(device))


def test_a_node_holds_nothing_beside_its_saved_tensors() -> None:
    """A recomputed block gives those up after its forward; whatever else a node held would stay until backward."""
    given = trained(of_case("three, r 16", torch.device("cpu")))
    source = given["x"].detach().clone()
    kept = weakref.ref(source)
    x = (given["x"] * 1).view(*BATCH, INNER)
    made = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, lambda shape: torch.zeros(shape)):
        outputs = linears(given)(x, None, remake=((source,), lambda inputs: inputs[0]))
    del source, x
    gc.collect()
    assert all(y.grad_fn is not None for y in outputs)
    assert kept() is None
    assert made() is None
