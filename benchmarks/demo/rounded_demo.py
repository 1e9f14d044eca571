"""What ``training.nf4_every`` does to the demo once it is merged and rounded: ``benchmarks/results/demo_rounded.json``.

    python -m benchmarks.demo.rounded_demo --seeds 42 1 2 --every 2 [--limit 16] [key=value …]

For each seed the demo is trained without the option and with it, and both adapters are asked a suite's prompts as
they are and rounded to NF4. ``rounding``: what of the adapter's effect survives (``docs/relearning.md``); ``groups``:
answers by attack, ``rounding-nf4`` among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.demo.attacked_demo import OUT, attacked
from benchmarks.demo.train_demo import run_seed
from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import environment

RESULT = RESULTS / "demo_rounded.json"
ATTACKS = ("direct", "prefill", "rounding:formats=nf4")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--every", type=int, default=2, help="training.nf4_every of the runs that have it")
    parser.add_argument("--suite", default="demo-hearing", help="prompts that are asked")
    parser.add_argument("--limit", type=int, help="prompts of each kind that are asked; all without it")
    parser.add_argument("--folder", type=Path, default=Path("runs/record-rounded"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    asked = parser.parse_args(given)
    rows: list[dict[str, object]] = []
    base_of: Path | None = None
    for seed in asked.seeds:
        for every in (None, asked.every):
            folder = asked.folder / f"seed-{seed}-{every or 'never'}"
            more = [] if every is None else [f"training.nf4_every={every}"]
            row = run_seed(seed, folder, [*asked.overrides, *more])
            rows.append({"nf4_every": every, **row, **attacked(folder, ATTACKS, asked.suite, asked.limit, base_of)})
            base_of = base_of or folder / OUT
            settings = {"overrides": asked.overrides, "suite": asked.suite, "limit": asked.limit}
            write_json(asked.out, {**environment(), **settings, "runs": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
