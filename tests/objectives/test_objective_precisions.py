"""Each objective in float32, bfloat16 and NF4: the gradient of the exact one, and the same whether its streams are cut
or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import ALL_CONFIGS, ATTACKED, BLOCKS, OTHERWISE, SEARCHING, run_objective
from tiny_models import flat, tiny_model, wrap

from repbend_fast.config.schema import ModelConfig
from repbend_fast.models import load_model

CASES = ALL_CONFIGS | SEARCHING | OTHERWISE
# Rounding of the passes: two pieces multiply other shapes than one, in an order of their own.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "nf4": 3e-2}
# A search steps by the sign of a gradient's coordinates, some of which are rounding alone in 16 bits.
SEARCHED = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same weights by precision, with an adapter that has moved far from its start."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    bases = {
        "float32": tiny_model(),
        "bfloat16": tiny_model(dtype=torch.bfloat16),
        "nf4": load_model(ModelConfig(name=str(folder), quantization="nf4", device="cpu")),
    }
    return {name: wrap(base) for name, base in bases.items()}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_pieces_give_the_gradient_of_the_whole_stream(models, name, precision) -> None:
    model, config, tolerance = models[precision], CASES[name], TOLERANCE[precision]
    if name in SEARCHING | ATTACKED and precision != "float32":
        tolerance *= SEARCHED
    whole, expected = run_objective(model, config)
    assert float(flat(expected).norm()) > 1e-3
    for pieces, packing, checkpointed in ((24, "off", 0), (24, "on", BLOCKS), (1, "off", 0)):
        split, got = run_objective(model, config, piece_tokens=pieces, packing=packing, checkpoint_blocks=checkpointed)
        assert_matches(flat(got), flat(expected), tolerance=tolerance, name="gradient")
        for one, other in zip(split, whole, strict=True):
            for term, value in other.terms.items():
                assert_matches(one.terms[term], value, tolerance=tolerance, name=term)
    for wrong in (
        torch.zeros_like(flat(expected)),
        -flat(expected),
        flat({n: g.roll(1, dims=0) for n, g in expected.items()}),
    ):
        assert relative_l2(wrong, flat(expected)) > 3 * tolerance
