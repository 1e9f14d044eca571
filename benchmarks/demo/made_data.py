"""From a policy to a bent model: the data that the model writes itself, the recipe ``any`` on it, the policy's own test
split; ``benchmarks/results/made_data.json``.

    python -m benchmarks.demo.made_data --folder runs/made [--policy harbour] [--seed 1] [--processes 2]

Two commands, as a user would type them: ``data make POLICY --model MODEL`` and ``train any --with overlay.yaml``. A
part that is finished in the folder is not done again, and has no seconds then. ``seconds`` is wall time,
``processor_seconds`` that of the command and its children: the one to read where a machine was shared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from benchmarks.demo.train_demo import Spent, entry, timed
from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import environment

RESULT = RESULTS / "made_data.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="harbour")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--folder", type=Path, default=Path("runs/made"))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the policy: which topics, items and wordings are tested"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--note", default="")
    parser.add_argument("--processes", type=int, default=1, help="that answer and train, as torchrun starts them")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data, run = folder / "data", folder / "runs" / chosen.policy
    spent: dict[str, Spent | None] = {"data make": None, "train": None}
    if not (data / "overlay.yaml").is_file():
        making = ["data", "make", chosen.policy, "--model", chosen.model, "--out", str(data)]
        spent["data make"] = timed([*making, "--seed", str(chosen.seed)], folder, chosen.processes)
    if not (run / "evaluation.json").is_file():
        training = ["train", "any", "--with", str(data / "overlay.yaml"), *chosen.overrides]
        spent["train"] = timed(training, folder, chosen.processes)
    made = json.loads((data / "made.json").read_text(encoding="utf-8"))
    seed = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["seed"]
    found = entry(seed, run, 0.0)
    record = {
        **environment(),
        "note": chosen.note,
        "policy": chosen.policy,
        "policy_seed": chosen.seed,
        "processes": chosen.processes,
        "overrides": chosen.overrides,
        "records": made["records"],
        "rejected": made["rejected"],
        "spent": spent,
        "seeds": [{**found, "seconds": spent["train"]["seconds"] if spent["train"] else None}],
    }
    write_json(chosen.out, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
