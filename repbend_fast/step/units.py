"""The length that counts as 1 at each hidden state, where distances are in units of the reference.

States of one model are a hundred times as long as those of another, and grow with depth, while cosines, KL and
likelihoods have no unit. The unit of a hidden state is the median norm of the reference rows that terms with ``unit``
"reference" read there, over the first records of the run. It is measured once, before training, and is a constant from
then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import torch
from repbend_kernels.blocks import accumulate_dtype
from torch import Tensor

from repbend_fast.data.records import Batch, Role
from repbend_fast.data.sampling import Encoded
from repbend_fast.errors import UserError
from repbend_fast.objectives.base import Objective
from repbend_fast.objectives.streams import Stream
from repbend_fast.step.runner import StreamRunner

RECORDS = 8
"""Records per role that are added at a time, until every hidden state has ``ROWS`` rows or a role has no more."""
ROWS = 512


def measure_units(
    runner: StreamRunner,
    objective: Objective,
    sets: Mapping[Role, Seq[Encoded]],
    known: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """The units of every hidden state that the objective's streams or probes need, by hidden state; empty where none
    does.

    Rows are those of the streams; a hidden state that only probes read takes theirs. Streams are cut into the runner's
    pieces, and are not perturbed. Draws no random numbers.

    Args:
        sets: the run's encoded records by role, read from the first on.
        known: units that stay as they are; only what they lack is measured.

    Raises:
        UserError: a median norm that is 0 or not finite.
    """
    known = known or {}
    read: dict[int, list[Tensor]] = {}
    probed: dict[int, list[Tensor]] = {}
    wanted: dict[int, list[Tensor]] = {}
    for batch in _batches(sets):
        made = objective.streams(batch, 0)
        for streams, norms in ((made, read), (objective.probes(batch), probed), (_searches(made), probed)):
            for stream in streams:
                for layer, found in _norms(runner, stream, known):
                    norms.setdefault(layer, []).append(found)
        wanted = probed | read
        if all(sum(map(len, of_layer)) >= ROWS for of_layer in wanted.values()):
            break
    measured = {layer: _median(layer, of_layer) for layer, of_layer in wanted.items()}
    return dict(sorted({**measured, **known}.items()))


def _median(layer: int, norms: list[Tensor]) -> float:
    unit = float(torch.cat(norms).median())
    if not 0 < unit < float("inf"):
        raise UserError(
            f"objective.distance_unit=reference: the median norm of the reference's rows at hidden state {layer} is "
            f"{unit:g}, which cannot "
            "be a unit; set distance_unit=state, or model.dtype to one that holds this model's states"
        )
    return unit


def _batches(sets: Mapping[Role, Seq[Encoded]]) -> Iterator[Batch]:
    """The first records of every role, ``RECORDS`` at a time, as long as every role has some left."""
    fewest = min((len(of_role) for of_role in sets.values()), default=0)
    for start in range(0, fewest, RECORDS):
        of_role: dict[Role, tuple[Any, ...]] = {
            role: tuple(records[i] for i in range(start, min(start + RECORDS, len(records))))
            for role, records in sets.items()
        }
        yield Batch(
            of_role.get("safe", ()), of_role.get("unsafe", ()), of_role.get("pair", ()), of_role.get("retain", ())
        )


def _searches(streams: Seq[Stream]) -> Iterator[Stream]:
    """What the searches of streams read, as streams of distances."""
    for stream in streams:
        if stream.search is not None and stream.search.measured:
            yield Stream(stream.name, stream.search.sequences, stream.search.measured)


def _norms(runner: StreamRunner, stream: Stream, known: Mapping[int, float]) -> Iterator[tuple[int, Tensor]]:
    """``(layer, norms of its reference rows)`` per piece, the norms on the CPU, [R]."""
    asked = tuple(rows for term in stream.terms for rows in term.unit_rows(known))
    if not asked:
        return
    for of_terms in runner.reference_rows(replace(stream, terms=asked)):
        for rows in of_terms:
            for layer, states in rows.items():
                yield layer, _row_norms(states)


def _row_norms(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=-1, dtype=accumulate_dtype(states.dtype)).cpu()
