"""Our step of this checkout against another one's, interleaved: has a change of the code made the step slower?

    git worktree add OLD COMMIT
    taskset -c 1 python -m benchmarks.step.step_versions OLD      # writes benchmarks/results/step_house.json

A round is two processes, each with one checkout's code and the same small model, batch and adapter, which run blocks
of steps in turn, A B B A …, while the other waits. What counts is CPU time on one thread: a machine that others use too
lengthens the wall time of either side as it likes. The ratio is that of the medians over all blocks of all rounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import SupportsFloat, TypedDict, cast

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "step_house.json"
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
"""Large enough for matrix products to take most of a step, small enough for its overhead to be seen."""
WINDOW, WIDTH, EXAMPLES = (4, 4), 192, 2
LEVERS: dict[str, dict[str, int]] = {"default": {}, "small": {"piece_tokens": 512, "checkpoint_blocks": 4}}
BAR = 1.02
SIDES = ("old", "new")


class Times(TypedDict):
    """Seconds of each step, and the terms of the first."""

    cpu: list[float]
    wall: list[float]
    terms: dict[str, float]


class Block(Times):
    """Times of one side, ``old`` or ``new``."""

    levers: str
    side: str


class Numbered(Block):
    """A block of the pair of processes number ``round``."""

    round: int


def order(pairs: int) -> list[int]:
    """Which side each block is: A B, B A, A B … so that a drift of the machine falls on both."""
    return [side for pair in range(pairs) for side in ((0, 1), (1, 0))[pair % 2]]


def summary(blocks: Sequence[Numbered]) -> dict[str, object]:
    """Medians and ratios (this checkout over the other) of one lever setting's blocks."""
    found: dict[str, object] = {}
    by_round = {}
    for number in sorted({block["round"] for block in blocks}):
        old, new = (
            [s for b in blocks if (b["side"], b["round"]) == (side, number) for s in b["cpu"]] for side in SIDES
        )
        by_round[number] = round(statistics.median(new) / statistics.median(old), 4)
    found["cpu_ratio_by_round"] = by_round
    for clock in ("cpu", "wall"):
        old, new = ([s for b in blocks if b["side"] == side for s in b[clock]] for side in SIDES)
        found[f"{clock}_seconds_median"] = {
            "old": round(statistics.median(old), 5),
            "new": round(statistics.median(new), 5),
        }
        found[f"{clock}_ratio"] = round(statistics.median(new) / statistics.median(old), 4)
        found[f"{clock}_ratio_of_least"] = round(min(new) / min(old), 4)
    return found


class Worker:
    """A process with the code of ``tree``."""

    def __init__(self, tree: Path) -> None:
        path = os.pathsep.join(str(tree / folder) for folder in (".", "kernels", "benchmarks"))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # -P: this file's own folder would come before the other checkout's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--worker"],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, levers: str, steps: int) -> Times:
        """CPU and wall seconds of each of ``steps`` steps after one that is not counted, and the terms; no steps: the
        terms without dropout.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([levers, steps]) + "\n")
        self.process.stdin.flush()
        answer: Times = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()


def work() -> None:
    """Answers the questions on standard input, one a line."""
    cases, sides = (_of_this_checkout(name) for name in ("step_cases", "step_sides"))
    import torch

    torch.set_num_threads(1)
    cases.TINY_SHAPE.update(SHAPE)
    case = cases.Case(cases.Model("small", WINDOW), "float32", EXAMPLES, "real", width=WIDTH)
    base = cases.load_base(case, torch.device("cpu"))
    batch = case.batch(SHAPE["vocab_size"])
    with sides.adapted(case, base) as model:
        for line in sys.stdin:
            levers, steps = json.loads(line)
            dropout = cases.LORA.dropout if steps else 0.0  # the versions draw their masks differently
            with sides.set_up(sides.Side("ours", LEVERS[levers]), case, model, dropout) as stepper:
                print(json.dumps(timed_block(lambda: stepper.step(batch), model.zero_grad, steps)), flush=True)


def _of_this_checkout(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"benchmarks.step.{name}")
    except ModuleNotFoundError:  # before the benchmarks had folders
        return importlib.import_module(name)


def timed_block(step: Callable[[], Mapping[str, SupportsFloat]], clear: Callable[[], None], steps: int) -> Times:
    """CPU and wall seconds of each of ``steps`` steps after one that is not counted, and the terms."""
    terms, cpu, wall = step(), [], []
    for _ in range(steps):
        clear()
        starts = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - starts[0])
        wall.append(time.perf_counter() - starts[1])
    clear()
    return {"cpu": cpu, "wall": wall, "terms": {name: float(value) for name, value in terms.items()}}


def round_of(trees: Sequence[Path], pairs: int, steps: int, settings: Sequence[str]) -> Iterator[Block]:
    """Blocks of one pair of processes; each says its levers and its side."""
    with ExitStack() as left:
        workers = [Worker(tree) for tree in trees]
        for worker in workers:
            left.callback(worker.close)
        for levers in settings:
            compared(levers, *(worker.ask(levers, 0)["terms"] for worker in workers))
        for levers in settings:
            for side in order(pairs):
                yield {"levers": levers, "side": SIDES[side], **workers[side].ask(levers, steps)}


def compared(levers: str, old: Mapping[str, float], new: Mapping[str, float]) -> None:
    """Raises ``AssertionError`` where the sides do not compute the same: then their times say nothing."""
    assert old.keys() == new.keys(), (levers, old, new)
    for name in old:
        assert math.isclose(old[name], new[name], rel_tol=1e-4, abs_tol=1e-6), (levers, name, old[name], new[name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the record; 1 where the step takes more CPU time than the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=4, help="of blocks, per round and lever setting")
    parser.add_argument("--steps", type=int, default=2, help="counted, per block")
    parser.add_argument("--levers", nargs="+", choices=tuple(LEVERS), default=list(LEVERS))
    parser.add_argument("--more", action="store_true", help="add these rounds to those of the record")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work()
        return 0
    if options.old is None:
        parser.error("which checkout to compare with?")
    blocks: list[Numbered] = json.loads(options.out.read_text(encoding="utf-8"))["blocks"] if options.more else []
    first = 1 + max((block["round"] for block in blocks), default=-1)
    for number in range(first, first + options.rounds):
        for block in round_of((options.old.resolve(), ROOT), options.pairs, options.steps, options.levers):
            blocks.append(cast(Numbered, {"round": number, **block}))
            print(number, block["levers"], block["side"], *(f"{s:.3f}" for s in block["cpu"]), flush=True)
    from repbend_fast.environment import commit, environment

    found = {
        levers: summary([b for b in blocks if b["levers"] == levers])
        for levers in LEVERS
        if any(b["levers"] == levers for b in blocks)
    }
    head = {
        **environment(),
        "old_commit": commit(options.old),
        "threads": 1,
        "model": SHAPE,
        "window": WINDOW,
        "width": WIDTH,
        "examples": EXAMPLES,
        "levers": LEVERS,
        "bar": BAR,
        "summary": found,
    }
    for block in blocks:
        block["cpu"], block["wall"] = ([round(s, 5) for s in seconds] for seconds in (block["cpu"], block["wall"]))
    lines = ",\n".join("  " + json.dumps(block) for block in blocks)
    text = json.dumps({**head, "blocks": []}, indent=1, ensure_ascii=False)
    options.out.write_text(text.replace('"blocks": []', f'"blocks": [\n{lines}\n ]') + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(any(cast(float, each["cpu_ratio"]) > BAR for each in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
