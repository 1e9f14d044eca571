"""Settings of all tests: no network, no tokenizer threads, no progress bars, nothing in the user's cache, GPU tests
skipped with a reason where there is no GPU.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
# Plans of tests depend neither on this machine's speed nor on what an earlier run has kept.
os.environ["REPBEND_CACHE"] = "off"
# A run of pytest that a test starts is nobody's worker, and times what it is asked to.
os.environ.pop("PYTEST_XDIST_WORKER", None)
os.environ.pop("PYTEST_XDIST_WORKER_COUNT", None)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` on machines without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
