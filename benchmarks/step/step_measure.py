"""Measures one case of the step benchmark: agreement, memory, then interleaved rounds; and the rows that come of it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import wait
from benchmarks.measure import peak_bytes, relative_error
from benchmarks.step.step_cases import LORA, Case, gradient_of, needed_flops, real_tokens
from benchmarks.step.step_sides import NotPlanned, Side, Stepper, adapted, set_up
from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, trainable_parameters
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.planning.tracker import module_tensors, tensor_bytes

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "nf4": 0.25}
"""Largest relative error of a term or of the gradient against the first baseline that ran. 16-bit logits and states are
some percent off on either side (DESIGN section 4); a zero, sign-flipped or shifted gradient is off by 1 or more.
"""


OUT_OF_MEMORY = "out of memory"
NOT_PLANNED = "not planned"
"""How failures begin that are answers: the card, or the budget, is too small."""


class Disagrees(AssertionError):
    """The side computes something else; it is not timed."""


@dataclass
class Measured:
    """What one side did on one case. ``failure`` says why there are no times. Bytes, seconds, FLOP, FLOP/s."""

    case: str
    side: str
    tokens: int
    failure: str = ""
    terms: dict[str, float] = field(default_factory=dict)
    loss_error: float = math.nan
    gradient_error: float = math.nan
    compared_with: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    model_bytes: int = 0
    recomputed: int = 0
    flops: int = 0
    matrix: float = math.nan
    levers: dict[str, object] = field(default_factory=dict)
    retreats: list[str] = field(default_factory=list)

    def note(self, stepper: Stepper) -> None:
        """Take the levers as they are after a step: running out of memory moves them."""
        self.recomputed, self.levers = stepper.recomputed, stepper.levers
        self.retreats += [words for words in stepper.retreats if words not in self.retreats]

    def row(self) -> dict[str, object]:
        """The record's row."""
        row: dict[str, object] = {"case": self.case, "side": self.side, "tokens": self.tokens}
        if self.failure or not self.seconds:
            return row | {"failure": self.failure or "not timed: the run was interrupted", "levers": self.levers}
        seconds = statistics.median(self.seconds)
        return row | {
            "seconds_median": round(seconds, 5),
            "seconds": [round(s, 5) for s in self.seconds],
            "spread": round((max(self.seconds) - min(self.seconds)) / seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "needed_tflop": round(self.flops / 1e12, 4),
            "matrix_fraction": round(self.flops / seconds / self.matrix, 4),
            "peak_bytes_above_model": self.peak_bytes,
            "peak_bytes_total": self.peak_bytes + self.model_bytes,
            "loss_relative_error": _short(self.loss_error),
            "gradient_relative_error": _short(self.gradient_error),
            "compared_with": self.compared_with,
            "terms": {name: _short(value) for name, value in self.terms.items()},
            "levers": self.levers,
            "retreats": self.retreats,
        }


def measure_case(
    case: Case, base: CausalLM, sides: Sequence[Side], rounds: int, matrix: float, found: list[Measured] | None = None
) -> list[Measured]:
    """Every side on the same batch: gradients compared with dropout off, then with the published dropout one step of
    each for memory and ``rounds`` of one step of each in turn for time.

    A side that runs out of memory, disagrees or cannot keep its budget has the reason in ``failure``.

    Args:
        matrix: the machine's measured rate in FLOP/s, of which ``matrix_fraction`` is a share.
        found: an empty list to fill, for a caller that wants what there is when the run is interrupted.
    """
    batch = case.batch(base.config.get_text_config().vocab_size)
    found = [] if found is None else found
    found += [Measured(case.name, side.name, real_tokens(batch), matrix=matrix) for side in sides]
    with adapted(case, base) as model:
        model_bytes = tensor_bytes(module_tensors(model))
        _compare(case, model, sides, batch, found)
        for side, measured in zip(sides, found):
            _guarded(measured, partial(_remember_peak, side, case, model, batch, measured))
        try:
            for _ in range(rounds):
                for side, measured in zip(sides, found):
                    _guarded(measured, partial(_time, side, case, model, batch, measured))
        finally:
            for measured in found:
                measured.model_bytes, measured.flops = (
                    model_bytes,
                    needed_flops(case, model, batch, measured.recomputed),
                )
    return found


def _guarded(measured: Measured, call: Callable[[], None]) -> None:
    if measured.failure:
        return
    try:
        call()
    except torch.OutOfMemoryError:
        measured.failure = OUT_OF_MEMORY
    except NotPlanned as error:
        measured.failure = f"{NOT_PLANNED}: {error}"
    except (Disagrees, UserError) as error:
        measured.failure = str(error)
    except Exception as error:  # a baseline that breaks must not take the other sides' numbers with it
        measured.failure = f"{type(error).__name__}: {error}"
    if measured.failure and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _compare(case: Case, model: AdaptedLM, sides: Sequence[Side], batch: Batch, found: list[Measured]) -> None:
    expected: list[tuple[str, dict[str, Tensor], Tensor]] = []

    def compare(side: Side, measured: Measured) -> None:
        with set_up(side, case, model, dropout=0.0) as stepper:
            terms = {name: value.detach().cpu() for name, value in stepper.step(batch).items()}
            gradient = gradient_of(model)
            measured.note(stepper)
        measured.terms = {name: float(value) for name, value in terms.items()}
        if not expected:
            expected.append((side.name, terms, gradient))
        measured.compared_with, exact_terms, exact_gradient = expected[0]
        measured.loss_error = max(relative_error(terms[name], value) for name, value in exact_terms.items())
        measured.gradient_error = relative_error(gradient, exact_gradient)
        # Written so that a NaN does not pass.
        if not max(measured.loss_error, measured.gradient_error) <= TOLERANCE[case.weights]:
            errors = f"loss {measured.loss_error:.2g}, gradient {measured.gradient_error:.2g}"
            raise Disagrees(f"{side.name} on {case.name} disagrees with {measured.compared_with}: {errors}; not timed")

    for side, measured in zip(sides, found):
        _guarded(measured, partial(compare, side, measured))


def _time(side: Side, case: Case, model: AdaptedLM, batch: Batch, measured: Measured) -> None:
    device = find_decoder(model).device
    with set_up(side, case, model, LORA.dropout) as stepper:
        if device.type == "cuda":
            stepper.step(batch)  # memory that the last side gave back is asked for again
            model.zero_grad(set_to_none=True)
        wait(device)
        start = time.perf_counter()
        stepper.step(batch)
        wait(device)
        measured.seconds.append(time.perf_counter() - start)
        measured.note(stepper)


def _remember_peak(side: Side, case: Case, model: AdaptedLM, batch: Batch, measured: Measured) -> None:
    with set_up(side, case, model, LORA.dropout) as stepper:
        gc.collect()  # what is freed while it runs must be the step's own
        measured.peak_bytes = peak_bytes(lambda: stepper.step(batch), find_decoder(model).device)
        measured.note(stepper)


def train_within(case: Case, base: CausalLM, budget: str, steps: int) -> dict[str, Any]:
    """``steps`` optimizer steps on different micro-batches under the levers planned for ``budget``, on CUDA with the
    process capped at it.

    Returns the record's row: seconds of all steps after the first, and the most bytes allocated at one time (CUDA
    only).
    """
    batches = case.batches(base.config.get_text_config().vocab_size, steps)
    side = Side(f"ours {budget}", budget=budget)
    row: dict[str, object] = {"case": case.name, "budget": budget, "steps": steps}
    with adapted(case, base) as model, set_up(side, case, model, LORA.dropout) as stepper:
        device = find_decoder(model).device
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-5, weight_decay=0.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            stepper.step(batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            wait(device)
            seconds.append(time.perf_counter() - start)
        assert all(bool(torch.isfinite(p).all()) for p in trainable_parameters(model)), "training diverged"
        if device.type == "cuda":
            row["peak_bytes_allocated"] = torch.cuda.max_memory_allocated(device)
            row["peak_bytes_reserved"] = torch.cuda.max_memory_reserved(device)
        tokens = sum(map(real_tokens, batches[1:]))
    timed = sum(seconds[1:])
    row |= {"seconds": round(timed, 4), "tokens_per_second": round(tokens / timed, 1)}
    return row | {"levers": stepper.levers, "retreats": stepper.retreats}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
