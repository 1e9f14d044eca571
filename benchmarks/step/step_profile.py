"""Where the time of a training step goes: seconds by part of the step and kind of work, from a torch.profiler trace.

    python -m benchmarks.step.step_profile --cases real --sides "ours fast" --threads 2
    python -m benchmarks.step.step_profile --cases llama3-8b-nf4-b4 --sides "ours,ours 8GB"      # on a GPU

The cases and sides of ``test_train_step.py``, and an optimizer step. ``seconds`` is measured without the profiler, the
rest with it. On a GPU a part's seconds are its kernels', and ``idle`` is what the step takes beyond the time in which
any kernel runs. The record is ``benchmarks/results/step_profile_<hardware>.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, hardware_slug, merged, wait, write_json
from benchmarks.step.profile_parts import Row, add_up, busy_seconds, profile_table, read
from benchmarks.step.step_cases import LORA, Case, cases_for, load_base, real_tokens
from benchmarks.step.step_sides import NotPlanned, Side, adapted, set_up, sides_for
from repbend_fast.config.schema import TrainingConfig
from repbend_fast.environment import environment
from repbend_fast.models import find_decoder, trainable_parameters
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.training.optimizer import build_optimizer


def profile_side(case: Case, model: AdaptedLM, side: Side, rounds: int, optimizer: str) -> Row:
    """One side's row: seconds of a plain step, and of a profiled one by (part, kind)."""
    batch = case.batch(model.config.get_text_config().vocab_size)
    device = find_decoder(model).device
    kept = [p.detach().clone() for p in trainable_parameters(model)]
    with set_up(side, case, model, LORA.dropout) as stepper:
        updates = build_optimizer(
            trainable_parameters(model),
            TrainingConfig(optimizer=optimizer, examples=case.examples),  # type: ignore[arg-type]
        )

        def step() -> None:
            with torch.profiler.record_function("repbend: step"):  # so that time in Python between the parts has a name
                stepper.step(batch)
                updates.step()
                updates.zero_grad(set_to_none=True)
                wait(device)

        step()  # kernels are compiled, memory asked for
        seconds = statistics.median(_seconds(step) for _ in range(rounds))
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            profiled = _seconds(step)
    with torch.no_grad():
        for parameter, value in zip(trainable_parameters(model), kept):
            parameter.copy_(value)
    slices, marked = read(profile, device.type == "cuda")
    parts = add_up(slices, marked)
    row: Row = {
        "case": case.name,
        "side": side.name,
        "optimizer": optimizer,
        "tokens": real_tokens(batch),
        "levers": stepper.levers,
    }
    row |= {"seconds": round(seconds, 5), "seconds_profiled": round(profiled, 5)}
    if device.type == "cuda":
        row["idle_seconds"] = round(max(0.0, seconds - busy_seconds(slices)), 5)
    row["parts"] = [
        {"part": part, "kind": kind, "seconds": round(spent, 6)}
        for (part, kind), spent in sorted(parts.items(), key=lambda item: -item[1])
        if spent >= 5e-7
    ]
    return row


def _guarded(case: Case, model: AdaptedLM, side: Side, rounds: int, optimizer: str) -> Row:
    """The side's row, with its ``failure`` where it does not fit: the other sides' profiles are wanted all the same."""
    try:
        return profile_side(case, model, side, rounds, optimizer)
    except (torch.OutOfMemoryError, NotPlanned) as error:
        traceback.clear_frames(error.__traceback__)
        failure = str(error).splitlines()[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"case": case.name, "side": side.name, "optimizer": optimizer, "failure": failure}


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write(path: Path, rows: list[Row]) -> dict[str, object]:
    """Adds the rows to the record, in the place of those of the same case and side."""
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    header = environment()
    record = header | {"rows": merged(kept, rows, header, _key)}
    write_json(path, record)
    return record


def _key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["side"], row["optimizer"]


def main() -> int:
    """Profiles, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="real", help="comma-separated parts of case names")
    parser.add_argument("--sides", default="ours", help="comma-separated sides")
    parser.add_argument("--optimizer", default="adamw", help="training.optimizer")
    parser.add_argument("--rounds", type=int, default=3, help="plain steps, of which the median counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; a record only with --results")
    parser.add_argument("--results", type=Path, default=None, help="file of the record")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        c for c in cases_for(device, arguments.smoke) if any(part in c.name for part in arguments.cases.split(","))
    ]
    known_sides = {s.name: s for s in sides_for(device, arguments.smoke)}
    sides = [known_sides[name] for name in arguments.sides.split(",") if name in known_sides]
    if not cases or not sides:
        known = ", ".join(c.name for c in cases_for(device, arguments.smoke)), ", ".join(known_sides)
        parser.error(f"no such case or side; cases: {known[0]}; sides: {known[1]}")
    rows = []
    path = arguments.results or (None if arguments.smoke else RESULTS / f"step_profile_{hardware_slug()}.json")
    for case in cases:
        base = load_base(case, device)
        with adapted(case, base) as model:
            for side in sides:
                rows.append(_guarded(case, model, side, arguments.rounds, arguments.optimizer))
                print(profile_table(environment() | {"rows": rows[-1:]}), flush=True)
                if path:
                    write(path, rows[-1:])
        del base
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
