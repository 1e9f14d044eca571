"""The demo's step with a system message that runs once: ``python -m benchmarks.step.beginnings``.

Processor seconds of both passes and the backward of the same micro-batches under three settings, in turn, A B C C B A:
every sequence with its own beginning; each stream's once (``memory.share_beginnings``); all streams' once, in shared
passes (``memory.merge_streams``). The record is ``benchmarks/results/shared_beginnings_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, write_json
from repbend_fast.config import load_config
from repbend_fast.environment import environment
from repbend_fast.runs.folder import RunFolder
from repbend_fast.step.levers import Levers
from repbend_fast.training.trainer import Trainer, make_ready, make_trainer

SETTINGS = {
    "own": {"share_beginnings": "off", "merge_streams": "off"},
    "once a stream": {"share_beginnings": "on", "merge_streams": "off"},
    "once for all": {"share_beginnings": "on", "merge_streams": "on"},
}


def measured(trainer: Trainer, levers: Levers, step: int) -> tuple[float, float, int]:
    """Processor seconds of one micro-batch, its loss, and the positions that its passes ran."""
    runner = trainer.runner
    runner.levers = levers
    batch = trainer.data.sampler.next_batch()
    streams = trainer.objective.streams(batch, step)
    started = time.process_time()
    results = runner.backward_all(streams, dropout_seed=step)
    seconds = time.process_time() - started
    trainer.model.zero_grad(set_to_none=True)
    return seconds, sum(float(result.loss) for result in results), sum(result.tokens for result in results)


def main() -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="micro-batches of each setting")
    parser.add_argument("--out", type=Path, default=RESULTS / "shared_beginnings_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {name: [] for name in SETTINGS}
    losses: dict[str, list[float]] = {name: [] for name in SETTINGS}
    tokens: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("demo", [f"output.folder={folder}/run", "validation.every=0"])
        run = RunFolder(Path(config.output.folder))
        trainer = make_trainer(config, run, make_ready(config, run, False))
        levers = trainer.runner.levers
        for setting in SETTINGS.values():  # what is asked for once
            measured(trainer, replace(levers, **setting), 0)  # type: ignore[arg-type]
        state = trainer.data.sampler.state_dict()
        for step in range(options.steps):
            order = list(SETTINGS) if step % 2 == 0 else list(SETTINGS)[::-1]
            for name in order:
                trainer.data.sampler.load_state_dict(state)
                seconds, loss, count = measured(trainer, replace(levers, **SETTINGS[name]), step)  # type: ignore[arg-type]
                rows[name].append(round(seconds, 3))
                losses[name].append(loss)
                print(step, name, f"{seconds:.2f} s, loss {loss:.5g}", flush=True)
            state = trainer.data.sampler.state_dict()
            tokens.append(count)
    medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
    record = {
        **environment(),
        "threads": 1,
        "tokens": tokens,
        "settings": SETTINGS,
        "processor_seconds": rows,
        "losses": losses,
        "median": medians,
        "ratio_to_own": {name: round(median / medians["own"], 3) for name, median in medians.items()},
    }
    write_json(options.out, record)
    print(json.dumps(record["ratio_to_own"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
