"""What bending did to hidden states: safe and unsafe rows, before and after, layer by layer in two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder, run_decoder

BATCH = 8
KINDS = ("safe", "unsafe")
SIDES = ("base", "bent")


def last_rows(model: CausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Every hidden state at the last token of each sequence: float64 [layers, N, D] on the CPU."""
    decoder = find_decoder(model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    parts: list[list[Tensor]] = [[] for _ in range(decoder.num_blocks + 1)]
    for start in range(0, len(order), BATCH):
        batch = [sequences[i] for i in order[start : start + BATCH]]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ends = torch.tensor([len(sequence) - 1 for sequence in batch])

        def visit(layer: int, hidden: Tensor, ends: Tensor = ends) -> Tensor:
            rows = torch.arange(len(ends), device=hidden.device)
            parts[layer].append(hidden[rows, ends.to(hidden.device)].double().cpu())
            return hidden

        with torch.no_grad():
            run_decoder(decoder, ids.to(decoder.device), stop=decoder.num_blocks, visit=visit)
    states = torch.stack([torch.cat(part) for part in parts])
    return states[:, torch.tensor(order).argsort()]


def measure_bending(
    on: Callable[[str], AbstractContextManager[CausalLM]], sequences: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, object]:
    """What ``bending_svg`` draws.

    Args:
        on: enters the model as ``base`` or ``bent`` (``Sides.on``).
        sequences: token ids by kind, ``safe`` and ``unsafe``; at least one each.

    Returns:
        ``layers``: one mapping for each hidden state, with ``distance`` and ``cosine`` by kind (the mean over rows of
        ‖bent − base‖ / ‖base‖ and of cos(base, bent)), the ``share`` of the variance that the plane holds, and
        ``points``: by side and kind, [N, 2] in the plane of all of the layer's rows.
    """
    states: dict[tuple[str, str], Tensor] = {}
    for side in SIDES:
        with on(side) as model:
            states |= {(side, kind): last_rows(model, sequences[kind]) for kind in KINDS}
    count = len(states["base", "safe"])
    layers = [_layer({key: rows[layer] for key, rows in states.items()}) for layer in range(count)]
    return {"format": 1, "counts": {kind: len(sequences[kind]) for kind in KINDS}, "layers": layers}


def _layer(rows: Mapping[tuple[str, str], Tensor]) -> dict[str, object]:
    together = torch.cat(list(rows.values()))
    points, share = plane(together)
    placed = dict(zip(rows, points.split([len(part) for part in rows.values()]), strict=True))
    distance, cosine = {}, {}
    for kind in KINDS:
        base, bent = rows["base", kind], rows["bent", kind]
        tiny = torch.finfo(base.dtype).tiny
        distance[kind] = float(((bent - base).norm(dim=-1) / base.norm(dim=-1).clamp(min=tiny)).mean())
        cosine[kind] = float(torch.cosine_similarity(base, bent, dim=-1).mean())
    return {
        "distance": distance,
        "cosine": cosine,
        "share": share,
        "points": {
            side: {kind: [[round(x, 5) for x in point] for point in placed[side, kind].tolist()] for kind in KINDS}
            for side in SIDES
        },
    }


def plane(rows: Tensor) -> tuple[Tensor, float]:
    """The rows [N, D] in their first two principal components, [N, 2], and the share of the variance in these.

    A component has no sign of its own; here its largest entry is positive, so that a picture is the same each time.
    """
    centred = rows - rows.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[:2]
    kept = kept * kept.gather(1, kept.abs().argmax(1, keepdim=True)).sign()
    points = centred @ kept.T
    if points.shape[1] < 2:
        points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    total = float(sizes.square().sum())
    return points, float(sizes[:2].square().sum()) / total if total > 0 else 1.0
