"""Kernel tests run every implementation this process can run; NaN fills whatever an op allocates and forgets to write.

On a CPU that is ``torch``; under TRITON_INTERPRET=1 (a process of its own, see ``test_triton_interpreter``) it is
``triton`` through the interpreter; on a GPU both, marked ``gpu``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# No interpreter inside the interpreter, no compiler where kernels are interpreted.
collect_ignore = ["test_triton_interpreter.py", "test_cubin_report.py", "test_compile.py"] if INTERPRETING else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives ``implementation`` its values."""
    if "implementation" not in metafunc.fixturenames:
        return
    if INTERPRETING:
        values = [pytest.param("triton", id="triton")]
    elif torch.cuda.is_available():
        values = [pytest.param(name, id=name, marks=pytest.mark.gpu) for name in ("torch", "triton")]
    else:
        values = [pytest.param("torch", id="torch")]
    metafunc.parametrize("implementation", values, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU every test here that takes a ``device`` runs on it, so it is one of the ``gpu`` tests."""
    if INTERPRETING or not torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors lie."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: threads would only wait for each other, and for other work on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (the largest integer), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU the mode would refuse matrix products for their workspace; here it only has to fill memory.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
