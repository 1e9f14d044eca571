"""Measures one case of the step benchmark: agreement, interleaved rounds, then memory; and the rows that come of it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import wait
from measure import peak_bytes, relative_error
from step_cases import LORA, Case, gradient_of, model_bytes, needed_flops, real_tokens
from step_sides import Side, set_up
from torch import Tensor

from repbend_fast.data.records import Batch
from repbend_fast.models import find_decoder

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "nf4": 0.25}
"""Largest relative error of a term or of the gradient against the first baseline that ran. 16-bit logits and states are some
percent off on either side (DESIGN section 4); a zero, sign-flipped or shifted gradient is off by 1 or more."""


class Disagrees(AssertionError):
    """The side computes something else; it is not timed."""


@dataclass
class Measured:
    """What one side did on one case. ``failure`` says why there are no times."""

    side: str
    failure: str = ""
    terms: dict[str, float] = field(default_factory=dict)
    loss_error: float | None = None
    gradient_error: float | None = None
    compared_with: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    model_bytes: int = 0
    recomputed: int = 0
    levers: dict[str, Any] = field(default_factory=dict)


def measure_case(case: Case, base: Any, sides: Sequence[Side], rounds: int) -> dict[str, Measured]:
    """Every side on the same batch: gradients compared with dropout off, then ``rounds`` of one step of each side in turn and one
    round for memory, with the published dropout.

    A side that runs out of memory or disagrees keeps the reason in ``failure``.
    """
    batch = case.batch(base.config.get_text_config().vocab_size)
    found = {side.name: Measured(side.name) for side in sides}
    _compare(case, base, sides, batch, found)
    for _ in range(rounds):
        for side in sides:
            _guarded(found[side.name], lambda side=side: found[side.name].seconds.append(_timed(side, case, base, batch)))
    for side in sides:
        _guarded(found[side.name], lambda side=side: _remember_peak(side, case, base, batch, found[side.name]))
    return found


def _guarded(measured: Measured, call: Any) -> None:
    if measured.failure:
        return
    try:
        call()
    except torch.OutOfMemoryError:
        measured.failure = "out of memory"
    except Disagrees as error:
        measured.failure = str(error)
    if measured.failure and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compare(case: Case, base: Any, sides: Sequence[Side], batch: Batch, found: dict[str, Measured]) -> None:
    expected: list[tuple[str, dict[str, Tensor], Tensor]] = []

    def compare(side: Side) -> None:
        measured = found[side.name]
        with set_up(side, case, base, dropout=0.0) as stepper:
            terms = {name: value.detach().cpu() for name, value in stepper.step(batch).items()}
            gradient = gradient_of(stepper.model)
        measured.terms = {name: float(value) for name, value in terms.items()}
        if not expected:
            expected.append((side.name, terms, gradient))
        compared_with, exact_terms, exact_gradient = expected[0]
        measured.compared_with = compared_with
        measured.loss_error = max(relative_error(terms[name], value) for name, value in exact_terms.items())
        measured.gradient_error = relative_error(gradient, exact_gradient)
        worst = max(measured.loss_error, measured.gradient_error)
        # Not `worst > tolerance`, which a NaN would pass.
        if not worst <= TOLERANCE[case.weights]:
            errors = f"loss {measured.loss_error:.2g}, gradient {measured.gradient_error:.2g}"
            raise Disagrees(f"{side.name} on {case.name} disagrees with {compared_with}: {errors}; not timed")

    for side in sides:
        _guarded(found[side.name], lambda side=side: compare(side))


def _timed(side: Side, case: Case, base: Any, batch: Batch) -> float:
    device = find_decoder(base).device
    with set_up(side, case, base, LORA.dropout) as stepper:
        if device.type == "cuda":
            stepper.step(batch)  # memory that the last side gave back is asked for again
            stepper.model.zero_grad(set_to_none=True)
        wait(device)
        start = time.perf_counter()
        stepper.step(batch)
        wait(device)
        return time.perf_counter() - start


def _remember_peak(side: Side, case: Case, base: Any, batch: Batch, measured: Measured) -> None:
    with set_up(side, case, base, LORA.dropout) as stepper:
        measured.model_bytes = model_bytes(stepper.model)
        gc.collect()  # what is freed while it runs must be the step's own
        measured.recomputed, measured.levers = stepper.recomputed, stepper.levers
        measured.peak_bytes = peak_bytes(lambda: stepper.step(batch), find_decoder(base).device)


def rows_of(case: Case, base: Any, found: dict[str, Measured], matrix: float) -> list[dict[str, Any]]:
    """The record's rows. ``matrix`` is the machine's measured rate in FLOP/s, of which ``matrix_fraction`` is a share."""
    batch = case.batch(base.config.get_text_config().vocab_size)
    tokens = real_tokens(batch)
    rows = []
    for measured in found.values():
        row: dict[str, Any] = {"case": case.name, "side": measured.side, "tokens": tokens}
        if measured.failure:
            rows.append(row | {"failure": measured.failure})
            continue
        assert measured.peak_bytes is not None
        seconds = statistics.median(measured.seconds)
        flops = needed_flops(base, case, batch, measured.recomputed)
        row |= {
            "seconds_median": round(seconds, 5),
            "seconds": [round(s, 5) for s in measured.seconds],
            "spread": round((max(measured.seconds) - min(measured.seconds)) / seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "needed_tflop": round(flops / 1e12, 4),
            "matrix_fraction": round(flops / seconds / matrix, 4),
            "peak_bytes_above_model": measured.peak_bytes,
            "peak_bytes_total": measured.peak_bytes + measured.model_bytes,
            "loss_relative_error": _short(measured.loss_error),
            "gradient_relative_error": _short(measured.gradient_error),
            "compared_with": measured.compared_with,
            "terms": {name: _short(value) for name, value in measured.terms.items()},
            "levers": measured.levers,
        }
        rows.append(row)
    return rows


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case and side: how many times faster than each baseline, and the share of its memory above the model."""
    done = {(row["case"], row["side"]): row for row in rows if "failure" not in row}
    ratios = []
    for (case, side), row in done.items():
        found: dict[str, Any] = {"case": case, "side": side}
        for baseline, word in (("eager", "eager"), ("peft+liger", "peft_liger")):
            other = done.get((case, baseline))
            if other is not None and side != baseline:
                found[f"times_faster_than_{word}"] = round(other["seconds_median"] / row["seconds_median"], 3)
                found[f"memory_share_of_{word}"] = round(row["peak_bytes_above_model"] / other["peak_bytes_above_model"], 4)
        if len(found) > 2:
            ratios.append(found)
    return ratios


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
