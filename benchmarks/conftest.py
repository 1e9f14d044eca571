"""What every op benchmark shares: sizes, the machine's own rates, and the record that becomes
``results/<hardware>.json``.

    pytest benchmarks --benchmark-only                     # the CPU set; on a GPU the GPU set
    pytest benchmarks --benchmark-only --sweep             # on a GPU: the rows, widths and vocabularies that people use
    pytest benchmarks --benchmark-only --results FILE      # write the record elsewhere
    pytest benchmarks --benchmark-disable --smoke          # tiny sizes, nothing written: do the benchmarks still run?

A row has time, peak memory above the inputs (and how much of it are the returned gradients), error against float64, and
the rate it reaches as a share of what this machine does in a plain copy or matrix product. A contender whose value or
gradient is wrong fails instead of being timed.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import RESULTS, Machine, Measure, Work, hardware_slug, median_seconds, rates, wait, write_record
from benchmarks.measure import peak_bytes, relative_error


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--smoke``, ``--results`` and ``--threads``; ``--cases``, ``--sides`` and ``--rounds`` are the step
    benchmark's.
    """
    parser.addoption("--smoke", action="store_true", help="tiny sizes, one round, a record only with --results")
    parser.addoption(
        "--sweep", action="store_true", help="every size of a GPU's set, not the one that the goals are about"
    )
    parser.addoption(
        "--threads", type=int, default=1, help="CPU threads (default 1, where other work disturbs a time least)"
    )
    parser.addoption(
        "--results", type=Path, default=None, help="file of the record (default: benchmarks/results/<hardware>.json)"
    )
    parser.addoption(
        "--cases", default=None, help="step benchmark: comma-separated parts of case names (default: all but Mistral)"
    )
    parser.addoption("--sides", default=None, help="step benchmark: comma-separated sides (default: all)")
    parser.addoption("--rounds", type=int, default=5, help="step benchmark: steps of every side, taken in turn")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether this run only checks that the benchmarks work."""
    return bool(request.config.getoption("--smoke"))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives ``size`` the values of the module's ``SIZES``, or of the function's entry in it: ``smoke``, ``cpu``,
    ``cuda``, ``sweep``.
    """
    if "size" not in metafunc.fixturenames:
        return
    option, sizes = metafunc.config.getoption, metafunc.module.SIZES
    sizes = sizes.get(metafunc.function.__name__, sizes)
    chosen = sizes["smoke" if option("--smoke") else DEVICE.type]
    if option("--sweep") and DEVICE.type == "cuda" and not option("--smoke"):
        chosen = [*chosen, *sizes.get("sweep", [])]
    metafunc.parametrize("size", chosen, ids=lambda size: "x".join(map(str, size)), scope="module")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A contender that does not fit into a card is skipped with that reason; ours has to fit."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if str(given.get("contender", "ours")).startswith("ours") and given.get("chunked", True):
            raise
        traceback.clear_frames(
            error.__traceback__
        )  # pytest keeps the error until the next test, and its frames hold the tensors
        torch.cuda.empty_cache()
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return DEVICE


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def machine(device: torch.device, dtype: torch.dtype, smoke: bool) -> Machine:
    """Measured once: a copy far larger than the caches, and a large matrix product on random data."""
    cuda = device.type == "cuda"
    elements, side = (1 << 16, 64) if smoke else (1 << 30, 8192) if cuda else (1 << 26, 2048)
    source, target = (
        torch.ones(elements, dtype=torch.uint8, device=device),
        torch.empty(elements, dtype=torch.uint8, device=device),
    )
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = median_seconds(lambda: target.copy_(source), device, 9)
    return Machine(2 * elements / copy, 2 * side**3 / median_seconds(lambda: a @ b, device, 7))


@pytest.fixture
def measured(
    benchmark: BenchmarkFixture, device: torch.device, machine: Machine, smoke: bool, request: pytest.FixtureRequest
) -> Measure:
    """Checks, measures and records one contender."""

    def measure(work: Work) -> dict[str, object]:
        value, grads = work.calls[0]()
        errors = [
            relative_error(value, work.exact[0]),
            max((relative_error(g, e) for g, e in zip(grads, work.exact[1])), default=0.0),
        ]
        assert max(errors) <= work.tolerance, (
            f"{work.contender}: wrong by {errors}, allowed {work.tolerance}; not timed"
        )
        returned = sum(g.numel() * g.element_size() for g in grads)
        del value, grads
        row: dict[str, object] = {"op": work.op, "case": work.case, "contender": work.contender}
        row["error_value"], row["error_gradient"] = (float(f"{e:.3g}") for e in errors)
        row["peak_bytes"] = peak_bytes(work.calls[0], device)
        row["returned_bytes"] = returned

        calls, rounds = work.calls, 1 if smoke else 5
        if device.type == "cuda" and not smoke:
            lasting = median_seconds(calls[0], device, 3)
            calls = calls * max(1, min(MOST_CALLS, int(ROUND_SECONDS / lasting)) // len(calls))
            rounds = max(5, min(20, int(TIMED_SECONDS / (lasting * len(calls)))))

        def timed() -> None:
            for call in calls:
                call()
            wait(device)

        benchmark.group = f"{work.op} {work.case}"
        benchmark.extra_info.update(row)
        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=0 if smoke else 1)
        if benchmark.stats is not None:
            row |= rates(benchmark.stats.stats, work, machine, len(calls))
            request.config.stash[RECORD].append(row)
        return row

    return measure


ROUND_SECONDS, MOST_CALLS, TIMED_SECONDS = 0.02, 16, 2.0
"""On a GPU: a round is so many calls that the host's time before the first kernel, and after the last, is spread over
them; and all rounds of a contender together take about this long.
"""
RECORD = pytest.StashKey[list]()
MACHINE = pytest.StashKey[Machine]()


@pytest.fixture(scope="session", autouse=True)
def _keep_machine(machine: Machine, request: pytest.FixtureRequest) -> None:
    request.config.stash[MACHINE] = machine


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def pytest_configure(config: pytest.Config) -> None:
    """Opens the record and sets the number of CPU threads. A time limit's SIGTERM ends a run as Ctrl-C does, with its
    record.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[RECORD] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes what was measured, also where a contender failed or time ran out: there may be no second run.

    A run that passed replaces all rows of its ops, any other those that it has.
    """
    rows, config = session.config.stash[RECORD], session.config
    path = config.getoption("--results")
    if not rows or (config.getoption("--smoke") and not path):
        return
    write_record(path or RESULTS / f"{hardware_slug()}.json", rows, config.stash[MACHINE], whole=exitstatus == 0)
