"""The rows of the bending picture: right states, a plane with a fixed sign, distance and cosine by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, adapted_model, sequence, tiny_model

from repbend_fast.evaluation.bending import last_rows, measure_bending, plane
from repbend_fast.models.layers.switches import reference_model

SEQUENCES = {
    "safe": [sequence(length, 0, length).ids for length in (4, 9, 6)],
    "unsafe": [sequence(length, 0, 50 + length).ids for length in (7, 3)],
}


def test_rows_are_those_of_each_sequence_alone_in_the_order_given() -> None:
    model = tiny_model("gemma2")
    rows = last_rows(model, SEQUENCES["safe"])
    with torch.no_grad():
        alone = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in SEQUENCES["safe"]]
    expected = torch.stack([torch.stack([layer[0, -1] for layer in states]) for states in alone], dim=1)
    torch.testing.assert_close(rows, expected.double(), atol=1e-4, rtol=1e-4)


def test_distance_and_cosine_are_those_of_the_rows() -> None:
    model = adapted_model("llama", window=(BLOCKS,))

    @contextmanager
    def on(side: str) -> Iterator[Any]:
        if side == "bent":
            yield model
        else:
            with reference_model(model):
                yield model

    data = measure_bending(on, SEQUENCES)
    assert len(data["layers"]) == BLOCKS + 1
    assert data["counts"] == {"safe": 3, "unsafe": 2}
    assert data["layers"][0]["distance"] == {"safe": 0.0, "unsafe": 0.0}
    base, bent = last_rows(tiny_model("llama"), SEQUENCES["unsafe"])[-1], last_rows(model, SEQUENCES["unsafe"])[-1]
    last = data["layers"][-1]
    expected = ((bent - base).norm(dim=1) / base.norm(dim=1)).mean()
    assert last["distance"]["unsafe"] == pytest.approx(float(expected))
    assert expected > 0.01
    assert last["cosine"]["unsafe"] == pytest.approx(float(torch.cosine_similarity(base, bent).mean()))
    points = last["points"]
    assert [len(points[side][kind]) for side in ("base", "bent") for kind in ("safe", "unsafe")] == [3, 2, 3, 2]
    assert measure_bending(on, SEQUENCES) == data


def test_the_plane_keeps_what_lies_in_it_and_its_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(12, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 2.0])
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    rows = flat @ turned[:2] + 3.0
    points, share = plane(rows)
    assert share == pytest.approx(1.0)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(rows, rows))
    assert points[:, 0].var() > points[:, 1].var()
    # The same rows mirrored are mirrored points: the sign follows the directions, not the solver.
    mirrored, _ = plane(-rows)
    torch.testing.assert_close(mirrored, -points)
    torch.testing.assert_close(plane(rows.flip(0))[0], points.flip(0))


@pytest.mark.parametrize(("rows", "share"), [(torch.ones(3, 4), 1.0), (torch.ones(1, 4), 1.0), (torch.eye(2), 1.0)])
def test_rows_without_two_directions_have_points(rows: torch.Tensor, share: float) -> None:
    points, found = plane(rows.double())
    assert points.shape == (len(rows), 2)
    assert points.isfinite().all()
    assert found == pytest.approx(share)
