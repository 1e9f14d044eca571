"""The switch: precedence, what ``auto`` means, and errors where the implementation asked for cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import repbend_kernels
import torch
from op_calls import CALLS, CPU, spread
from repbend_kernels import bend_distance, get_implementation, implementation, selection, set_implementation


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """The switch as a fresh process has it, without the interpreter."""
    monkeypatch.setattr(selection, "_selected", "auto")
    monkeypatch.setattr(selection, "_INTERPRET", False)


def distance(**options) -> torch.Tensor:
    return bend_distance(torch.ones(2, 4), torch.zeros(2, 4), **options)


def test_auto_is_torch_on_the_cpu() -> None:
    assert selection.resolve(None, torch.ones(1)) == "torch"


def test_context_set_and_argument_take_precedence_in_this_order() -> None:
    set_implementation("eager")
    assert selection.resolve(None, torch.ones(1)) == "eager"
    with implementation("torch"):
        assert selection.resolve(None, torch.ones(1)) == "torch"
        assert selection.resolve("eager", torch.ones(1)) == "eager"
    assert get_implementation() == "eager"


def test_context_restores_after_an_error() -> None:
    with pytest.raises(KeyError), implementation("eager"):
        raise KeyError
    assert get_implementation() == "auto"


@pytest.mark.parametrize(
    "choose", [set_implementation, lambda name: implementation(name).__enter__(), lambda n: distance(implementation=n)]
)
def test_unknown_name(choose) -> None:
    with pytest.raises(ValueError, match=r"implementation: expected one of auto, torch, triton, eager, got 'cuda'"):
        choose("cuda")


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_the_cpu_raises(name: str) -> None:
    with (
        implementation("triton"),
        pytest.raises(RuntimeError, match=r"implementation='triton': tensors are on cpu, expected cuda"),
    ):
        CALLS[name](spread((2, 3, 8), torch.float32, CPU, 1))


def test_triton_without_triton_raises(monkeypatch) -> None:
    monkeypatch.setattr(selection, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        distance(implementation="triton")


def test_triton_in_float64_raises() -> None:
    with pytest.raises(RuntimeError, match="float64 runs on the torch path only"):
        bend_distance(torch.ones(2, 4).double(), torch.zeros(2, 4).double(), implementation="triton")


@pytest.mark.parametrize("name", CALLS)
def test_eager_equals_torch(name: str) -> None:
    results = []
    for chosen in ("torch", "eager"):
        leaf = spread((2, 3, 8), torch.float32, CPU, 1).requires_grad_()
        with implementation(chosen):
            value = CALLS[name](leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.path.dirname(os.path.dirname(repbend_kernels.__file__))
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )


def test_environment_variable() -> None:
    code = "import repbend_kernels; print(repbend_kernels.get_implementation())"
    assert python(code, REPBEND_KERNELS="eager").stdout.strip() == "eager"
    assert "REPBEND_KERNELS: expected one of" in python(code, REPBEND_KERNELS="fast").stderr
