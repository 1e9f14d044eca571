"""Are adapted and reference pass equal to the bit while LoRA's B is 0, at the sizes that are trained?

    python -m benchmarks.step.zero_distance                     # on a GPU: Llama-3-8B's shape, NF4 and bfloat16
    python -m benchmarks.step.zero_distance --tiny              # the same on a tiny model, on any device

One micro-batch of the published lengths, forward and backward, LoRA's dropout on, in one piece per stream and with all
blocks recomputed and the streams split. A kernel that chooses another order of summation for another size shows here
and not on small models. Exit status 1 if a distance of any layer is not 0.0. Each row is recorded as soon as it is
there, in ``benchmarks/results/zero_distance_<hardware>.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch

from benchmarks.harness import RESULTS, hardware_slug, merged, wait, write_json
from benchmarks.step.step_cases import LLAMA, LORA, TINY, Case, Weights, load_base, streams_of
from repbend_fast.config.schema import MemoryConfig
from repbend_fast.environment import environment
from repbend_fast.models import attach_lora, prepared
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.step import StreamRunner, dropout_seed
from repbend_fast.step.levers import levers_of

WEIGHTS: tuple[Weights, ...] = ("nf4", "bfloat16")
TINY_WIDTH = 192


class StreamZero(TypedDict):
    """Distances of one stream's term: how many layers were compared, in how many they are not 0, and the largest."""

    layers: int
    nonzero: int
    largest: float


class ZeroRow(TypedDict):
    """One case under one setting of the levers."""

    case: str
    setting: str
    levers: dict[str, object]
    terms: dict[str, StreamZero]
    seconds: float
    commit: NotRequired[str]
    date: NotRequired[str]


def cases(tiny: bool, weights: tuple[Weights, ...] = WEIGHTS) -> list[Case]:
    """The published batch of four on Llama-3-8B's shape, or two examples on the tiny model."""
    if tiny:
        return [Case(TINY, held, 2, "real", width=TINY_WIDTH) for held in weights]
    return [Case(LLAMA, held, 4, "real") for held in weights]


def settings(case: Case) -> Mapping[str, MemoryConfig]:
    """Levers by name. Pieces are as long as the longest sequence may be."""
    return {
        "one piece": MemoryConfig(merge_streams="off"),
        "streams merged": MemoryConfig(merge_streams="on"),
        "recomputed, split": MemoryConfig(piece_tokens=case.width, checkpoint_blocks="all"),
    }


def distances(case: Case, model: AdaptedLM, name: str, memory: MemoryConfig) -> ZeroRow:
    """One micro-batch of a model whose adapter is fresh."""
    streams = streams_of(case, model, case.batch(model.config.get_text_config().vocab_size))
    with prepared(model, levers_of(memory, model), liger="auto", dropout=LORA.dropout) as ready:
        runner = StreamRunner(ready, levers_of(memory, model))
        start = time.perf_counter()
        results = runner.backward_all(streams, dropout_seed=dropout_seed(0, 0, 0))
        wait(ready.device)
        seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    terms = {}
    for result in results:
        for term, layers in result.layers.items():
            values = [float(value) for value in layers.values()]
            nonzero = sum(value != 0 for value in values)
            terms[term] = StreamZero(layers=len(values), nonzero=nonzero, largest=max(map(abs, values)))
    return ZeroRow(case=case.name, setting=name, levers=runner.levers.as_dict(), terms=terms, seconds=round(seconds, 3))


def rows_of(case: Case, device: torch.device) -> Iterator[ZeroRow]:
    """The case under every setting."""
    base = load_base(case, device)
    torch.manual_seed(0)
    model = attach_lora(base, LORA, case.objective.window)
    for name, memory in settings(case).items():
        yield distances(case, model, name, memory)
    del base, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failures(row: ZeroRow) -> list[str]:
    """What of a row is not as it has to be."""
    where = f"{row['case']}, {row['setting']}"
    if not {"safe", "unsafe"} <= {term for term, found in row["terms"].items() if found["layers"]}:
        return [f"{where}: safe and unsafe distances are not both there"]
    return [
        f"{where}: {term} is not 0 in {found['nonzero']} of {found['layers']} layers, at most {found['largest']:.3g}"
        for term, found in row["terms"].items()
        if found["nonzero"]
    ]


def write_row(path: Path, row: ZeroRow) -> None:
    """Adds a row to the record, in the place of that of the same case and setting."""
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    header = environment()
    rows = merged(kept, [cast("dict[str, object]", row)], header, lambda r: (r["case"], r["setting"]))
    write_json(path, header | {"rows": rows})


def main(arguments: list[str] | None = None) -> int:
    """Runs, records and prints row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model; a record only with --results")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--results", type=Path, default=None, help="file of the record")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not chosen.tiny:
        parser.error("the shape of 8B parameters needs a CUDA device; --tiny runs on a CPU")
    path = chosen.results or (None if chosen.tiny else RESULTS / f"zero_distance_{hardware_slug()}.json")
    missed: list[str] = []
    for case in cases(chosen.tiny, tuple(chosen.weights)):
        for row in rows_of(case, device):
            if path:
                write_row(path, row)
            counted = ", ".join(f"{term} {found['layers']} layers" for term, found in row["terms"].items())
            print(f"{row['case']}, {row['setting']}: {counted}, {row['seconds']:.1f} s", flush=True)
            missed += failures(row)
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
