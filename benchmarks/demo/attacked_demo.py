"""The demo with and without latent adversarial training, under the strong embedding attack:
``benchmarks/results/demo_attacked.json``.

    python -m benchmarks.demo.attacked_demo --seeds 42 1 2 [--limit 16] [--suite demo-validation] [key=value …]

Each seed is trained by ``--recipe`` (``demo`` for what the attack does without it), measured on the demo's own prompts
as every run is, and asked ``--limit`` prompts of a kind by ``ATTACKS``. Runs of several calls stand in one record, each
with its settings. ``groups`` count prompts, ``answers`` the single answers of attacks that get several to each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks.demo.train_demo import run_seed
from benchmarks.harness import RESULTS, write_json
from repbend_fast import assess
from repbend_fast.assessment.answers import ANSWER_FIELDS, RowFile
from repbend_fast.assessment.json_rows import AnswerRow
from repbend_fast.environment import environment

RESULT = RESULTS / "demo_attacked.json"
ATTACKS = ("direct", "prefill", "embedding-strong:steps=150")
OUT = "eval-attacked"
"""Of a run's folder: what it answered."""


def attacked(
    folder: Path, attacks: Sequence[str], suite: str, limit: int | None, base_of: Path | None = None
) -> dict[str, object]:
    """What the run in ``folder`` answers under ``attacks``, what is left of it where one rounds it, and the seconds."""
    started = time.perf_counter()
    summary = assess(folder, suites=suite, attacks=attacks, out=folder / OUT, limit=limit, base_of=base_of).summary
    found = {name: summary[name] for name in ("rounding", "groups") if summary.get(name)}
    seconds = round(time.perf_counter() - started, 1)
    return {**found, "answers": labels_of_answers(folder / OUT), "seconds_attacked": seconds}


def labels_of_answers(folder: Path, judge: str = "rule") -> list[dict[str, object]]:
    """Of each attack that asks for several answers to a prompt, side by side: how many answers have which label.

    ``groups`` count prompts, where one answer that complies is enough.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in cast(list[AnswerRow], RowFile(folder / "answers.jsonl").read(ANSWER_FIELDS, mend=False)):
        labels = [opinion["label"] for opinion in row["opinions"].get(judge, [])]
        if len(labels) > 1:
            counts.setdefault((row["side"], row["attack"]), Counter()).update(labels)
    return [{"side": side, "attack": attack, **found} for (side, attack), found in counts.items()]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--limit", type=int, default=16, help="prompts of each kind that are attacked")
    parser.add_argument("--suite", default="demo-hearing", help="prompts that are attacked")
    parser.add_argument("--recipe", default="demo-adversarial", help="a bundled recipe of the demo, or a file")
    parser.add_argument("--folder", type=Path, default=Path("runs/record-attacked"))
    parser.add_argument("--base-of", type=Path, help="an evaluation whose answers of the base are taken")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    asked = parser.parse_args(given)
    settings = {"recipe": asked.recipe, "overrides": asked.overrides, "suite": asked.suite, "limit": asked.limit}
    before = json.loads(asked.out.read_text(encoding="utf-8"))["runs"] if asked.out.is_file() else []
    rows = [row for row in before if row["settings"] != settings or row["seed"] not in asked.seeds]
    base_of = asked.base_of
    for seed in asked.seeds:
        folder = asked.folder / f"seed-{seed}"
        row = run_seed(seed, folder, asked.overrides, recipe=asked.recipe)
        found = attacked(folder, ATTACKS, asked.suite, asked.limit, base_of)
        base_of = base_of or folder / OUT
        rows.append({"settings": settings, **row, **found})
        record = {**environment(), "runs": rows}
        write_json(asked.out, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
