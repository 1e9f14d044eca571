from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from scripted_model import POLICY


@pytest.fixture
def write_policy(tmp_path: Path) -> Callable[..., str]:
    """Writes the small policy with changes on top and gives its path; None takes a key out."""

    def write(**changes: object) -> str:
        values = {key: value for key, value in {**POLICY, **changes}.items() if value is not None}
        path = tmp_path / "policy.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return str(path)

    return write
