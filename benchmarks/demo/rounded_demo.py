"""What ``training.nf4_every`` does to the demo once it is merged and rounded: ``benchmarks/results/demo_rounded.json``.

    python -m benchmarks.demo.rounded_demo --seeds 42 1 2 --every 2 [--limit 16] [key=value …]

For each seed the demo is trained without the option and with it, and both adapters are asked the demo's prompts as
they are and rounded to NF4. ``rounding``: what of the adapter's effect survives (``docs/relearning.md``); ``groups``:
answers by attack, ``rounding-nf4`` among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.demo.train_demo import run_seed
from benchmarks.harness import RESULTS
from repbend_fast import assess
from repbend_fast.environment import environment

RESULT = RESULTS / "demo_rounded.json"
ATTACKS = ("direct", "prefill", "rounding:formats=nf4")


def measured(folder: Path, limit: int | None) -> dict[str, object]:
    """What the run in ``folder`` answers, rounded and not."""
    summary = assess(folder, suites="demo", attacks=ATTACKS, out=folder / "eval-rounded", limit=limit).summary
    return {"rounding": summary["rounding"], "groups": summary["groups"]}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--every", type=int, default=2, help="training.nf4_every of the runs that have it")
    parser.add_argument("--limit", type=int, help="prompts of each kind that are asked; all without it")
    parser.add_argument("--folder", type=Path, default=Path("runs/record-rounded"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    asked = parser.parse_args(given)
    rows: list[dict[str, object]] = []
    for seed in asked.seeds:
        for every in (None, asked.every):
            folder = asked.folder / f"seed-{seed}-{every or 'never'}"
            more = [] if every is None else [f"training.nf4_every={every}"]
            row = run_seed(seed, folder, [*asked.overrides, *more])
            rows.append({"nf4_every": every, **row, **measured(folder, asked.limit)})
            record = {**environment(), "overrides": asked.overrides, "limit": asked.limit, "runs": rows}
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
