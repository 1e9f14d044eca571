"""Plans of this checkout against another one's: has a change of the house changed what is planned?

    git worktree add OLD 4925416
    taskset -c 1 python -m benchmarks.memory.plan_versions OLD      # writes benchmarks/results/plans_house.json

``repbend-fast plan RECIPE --card 4090 --json`` of both, field by field, for every recipe that the other checkout has;
those for models of 7 and 8 billion parameters on 32 blocks of width 256, which has their windows. Streams are padded
and run apart, and levers are compared that both have: the other checkout knows no varlen attention and no shared
passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import commit, environment

ROOT = Path(__file__).parents[2]
RECORD = RESULTS / "plans_house.json"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
AS_THEN = ("memory.merge_streams=off", "memory.packing=off")
QLORA = "-qlora"
"""The end of a recipe's name that is an overlay of its own now."""


def planned(tree: Path, words: list[str]) -> dict[str, object]:
    """The plan of the checkout ``tree``, or its error."""
    path = os.pathsep.join(str(tree / folder) for folder in (".", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "repbend_fast", "plan", *words, "--card", "4090", "--json"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    plan: dict[str, object] = json.loads(done.stdout)
    return plan


def difference(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """The fields in which the plans differ, with both values, and the names of the others."""
    if isinstance(levers := old.get("levers"), dict) and isinstance(own := new.get("levers"), dict):
        new = new | {"levers": {name: own[name] for name in levers if name in own}}
    fields = [*old, *(name for name in new if name not in old)]
    different = {
        name: {"old": old.get(name), "new": new.get(name)} for name in fields if old.get(name) != new.get(name)
    }
    return {"different": different, "equal": [name for name in fields if name not in different]}


def main() -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--only", help="recipes with this in their name")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    old_tree, plans = options.old.resolve(), {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
        for name in sorted(path.stem for path in (old_tree / "recipes").glob("*.yaml")):
            if options.only and options.only not in name:
                continue
            own = [] if name.startswith("demo") else [f"model.name={folder}"]
            new_words = [name.removesuffix(QLORA), *(("--with", QLORA[1:]) if name.endswith(QLORA) else ())]
            plans[name] = difference(planned(old_tree, [name, *own]), planned(ROOT, [*new_words, *own, *AS_THEN]))
            print(name, *plans[name]["different"], flush=True)  # type: ignore[misc]
    head = {"what": "repbend-fast plan RECIPE --card 4090 --json of two commits", **environment()}
    record = {**head, "old_commit": commit(old_tree), "model": SHAPE, "plans": plans}
    write_json(options.out, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
