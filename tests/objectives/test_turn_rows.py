"""``loss_mode: assistant_turns``: every objective reads the turns that lie apart, and them alone, however a stream is
cut.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_oracles import Passes, forget_of
from objective_runs import ALL_CONFIGS, BATCH, BLOCKS, plain_terms, precise_model, run_objective
from tiny_models import flat, gradients

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.sections import MethodConfig

# As in test_objective_gradients.
TOLERANCE = 1e-8
FIRST, SECOND = Sequence(BATCH.unsafe[0].ids, 8, (1, 3, 4, 6)), Sequence(BATCH.unsafe[1].ids, 9, (2, 5))
TURNS = Batch(
    safe=(Sequence(BATCH.safe[0].ids, 5, (1, 2)), BATCH.safe[1]),
    unsafe=(FIRST, SECOND),
    pairs=BATCH.pairs,
    retain=BATCH.retain,
)
REPBEND = RepBendConfig(window_start=2, window_size=2, cosine=0.0, kl=0.0)
CONFIGS: dict[str, MethodConfig] = {"repbend": REPBEND, **{n: c for n, c in ALL_CONFIGS.items() if n != "repbend"}}


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def _plain(model: Any, config: MethodConfig) -> torch.Tensor:
    """The plain expression's gradient; RepBend's S and U alone."""
    model.zero_grad(set_to_none=True)
    if isinstance(config, RepBendConfig):
        safe = Passes(model, [*TURNS.safe, *(p.safe for p in TURNS.pairs)])
        unsafe = Passes(model, forget_of(TURNS))
        kept, bent = (
            (torch.linalg.vector_norm(p.h[layers] - p.r[layers], dim=-1) * p.answers()).sum()
            / (p.answers().sum() * counted)
            for p, layers, counted in (
                (safe, [*range(1, BLOCKS + 1)], BLOCKS + 1),
                (unsafe, list(config.window), len(config.window)),
            )
        )
        (config.safe * kept - config.unsafe * bent).backward()
    else:
        torch.stack(list(plain_terms(model, config, batch=TURNS).values())).sum().backward()
    return flat(gradients(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_all_turns(precise: Any, name: str) -> None:
    config = CONFIGS[name].model_copy(update={"loss_mode": "assistant_turns"})
    assert config.reads_turns
    expected = _plain(precise, config)
    for pieces, packing in ((None, "off"), (9, "off"), (24, "on")):
        _, got = run_objective(precise, config, piece_tokens=pieces, packing=packing, batch=TURNS)
        assert_matches(flat(got), expected, tolerance=TOLERANCE, name="gradient")
    _, last = run_objective(precise, config.model_copy(update={"loss_mode": "response_all"}), batch=TURNS)
    for wrong in (torch.zeros_like(expected), -expected):
        assert relative_l2(wrong, expected) > 0.1
    assert relative_l2(flat(last), expected) > 1000 * TOLERANCE  # what is kept may weigh most
    _, same = run_objective(precise, config.model_copy(update={"loss_mode": "response_all"}), batch=BATCH)
    _, single = run_objective(precise, config, batch=BATCH)
    assert torch.equal(flat(single), flat(same))
