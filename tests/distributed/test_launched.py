"""torchrun with two processes of which one fails: all end, with its reason."""

from __future__ import annotations

import json
import time

from tiny_run import TinyRun, rows
from two_processes import torchrun

FAILING = """
import os
import time
from pathlib import Path

from own_term import Small

from repbend_fast.errors import UserError


class Failing(Small):
    def streams(self, batch, step):
        if step == 3 and os.environ["RANK"] == "1":
            Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
            raise UserError("the second card is on fire")
        return super().streams(batch, step)
"""


def test_a_process_that_fails_ends_all_with_its_reason(tiny: TinyRun) -> None:
    (tiny.folder / "failing.py").write_text(FAILING, encoding="utf-8")
    failed_at = tiny.folder / "failed"
    recipe = tiny.recipe.read_text(encoding="utf-8").replace("window_size: 2", "").replace("window_start: 2", "")
    tiny.recipe.write_text(recipe.replace("objective:", "objective: {name: 'failing:Failing'}"), encoding="utf-8")
    done = torchrun("-m", "repbend_fast", "train", str(tiny.recipe), cwd=tiny.folder, FAILED_AT=str(failed_at))
    took = time.time() - float(failed_at.read_text(encoding="utf-8"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    reason = "the second card is on fire"
    assert f"error: {reason}" in lines
    assert f"error: process 1 of 2 ended the run: {reason}" in lines
    assert len(lines) == 2
    assert took < 30  # seconds on a machine that does other things too
    # The first process alone wrote, up to what was done.
    assert [row["step"] for row in rows(tiny.path, "step")] == [1, 2, 3]
    assert (tiny.path / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert json.loads((tiny.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
