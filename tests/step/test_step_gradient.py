"""The step's losses and gradients against one joint backward of the plain expression, however the step is split or laid
out.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from eager_oracle import eager_loss, eager_terms, limited_rows
from kernel_compare import assert_matches, relative_l2
from tiny_models import (
    BLOCKS,
    LAYOUTS,
    WITHOUT_DROPOUT,
    adapted_model,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    run_step,
    runner_on,
)
from torch import Tensor

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.step.levers import Levers

MODES = ("prompt_last", "prompt_all", "prompt_response", "response_all")
TOLERANCE = 1e-5
BATCH = ragged_batch()
LIMIT = 0.9


@pytest.fixture(scope="module")
def model() -> object:
    return adapted_model()


@pytest.fixture(scope="module")
def precise() -> object:
    return adapted_model(dtype=torch.float64)


def _joint(model, config) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    terms = eager_terms(model, BATCH, config)
    loss = eager_loss(terms, config)
    loss.backward()
    return terms, loss.detach(), gradients(model)


def _assert_same(results, got, terms, expected, tolerance=TOLERANCE) -> None:
    found = {name: value for result in results.values() for name, value in result.terms.items()}
    assert found.keys() == terms.keys()
    for name, value in terms.items():
        assert value.item() > 1e-3, name
        assert_matches(found[name], value.float(), tolerance=tolerance, name=name)
    assert got.keys() == expected.keys()
    assert_matches(flat(got), flat(expected), tolerance=tolerance, name="gradient")


CASES = [
    *({"loss_mode": mode, "alpha_mode": alpha} for mode, alpha in itertools.product(MODES, ("all", "target"))),
    *({"kl_reduction": "token", "loss_mode": mode, "pair": 0.4} for mode in MODES),
    {"published_quirks": True, "loss_mode": "prompt_last"},
    {"published_quirks": True, "loss_mode": "prompt_all"},
    {"pair": 0.4, "pair_positions": 3, "temperature": 1.0},
    {"window_start": 0, "window_size": 3, "pair": 0.4},
    {"window_start": 0, "window_size": 3, "alpha_mode": "target", "loss_mode": "prompt_response"},
    {"window_start": BLOCKS - 1, "window_size": 2, "alpha_mode": "target"},
    *({"unsafe_limit": LIMIT, "loss_mode": mode} for mode in ("prompt_response", "response_all")),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_streams_one_by_one_equal_one_joint_backward(precise, settings) -> None:
    config = objective_config(**settings)
    terms, loss, expected = _joint(precise, config)
    results, got = run_step(precise, config)
    _assert_same(results, got, terms, expected)
    assert float(sum(r.loss for r in results.values())) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dropped", ["safe", "unsafe", "cosine", "kl"])
def test_each_term_alone(precise, dropped) -> None:
    weights = {name: 0.7 if name == dropped else 0.0 for name in ("safe", "unsafe", "cosine", "kl")}
    config = objective_config(**weights)
    precise.zero_grad(set_to_none=True)
    terms = eager_terms(precise, BATCH, config)
    eager_loss(terms, config).backward()
    expected = gradients(precise)
    results, got = run_step(precise, config)
    assert {name for r in results.values() for name in r.terms} == {dropped}
    assert_matches(flat(got), flat(expected), tolerance=TOLERANCE, name="gradient")


MEMORY = {
    "one piece": {},
    "split": {"piece_tokens": 30},
    "one by one": {"piece_tokens": 1},
    "checkpoint 2": {"checkpoint_blocks": 2},
    "checkpoint all, split": {"checkpoint_blocks": "all", "piece_tokens": 30},
    "kl chunks": {"kl_chunk_rows": 5},
}


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize(
    "settings", [{"pair": 0.4}, {"loss_mode": "prompt_last", "published_quirks": True}], ids=["pair", "quirk"]
)
def test_memory_settings_change_nothing(model, memory, packing, settings) -> None:
    config = objective_config(**settings)
    terms, _, expected = _joint(model, config)
    results, got = run_step(model, config, memory=MemoryConfig(packing=packing, **memory))
    _assert_same(results, got, terms, expected, tolerance=5e-5)


def test_the_comparison_fails_for_wrong_gradients(model) -> None:
    _, got = run_step(model, objective_config())
    right = flat(got)
    shifted = flat({name: g.roll(1, dims=0) for name, g in got.items()})
    one_lost = flat({name: g * (i > 0) for i, (name, g) in enumerate(got.items())})
    for wrong in (torch.zeros_like(right), -right, shifted, right * 1.001, one_lost):
        with pytest.raises(AssertionError, match="relative L2"):
            assert_matches(wrong, right, tolerance=5e-5)


def test_the_oracle_sees_each_term(precise) -> None:
    """A wrong weight of any one term moves the joint gradient by far more than the tolerance."""
    config = objective_config(pair=0.4)
    _, _, expected = _joint(precise, config)
    for name in ("safe", "unsafe", "cosine", "kl", "pair"):
        changed = config.model_copy(update={name: getattr(config, name) * 1.1})
        assert relative_l2(flat(_joint(precise, changed)[2]), flat(expected)) > 40 * TOLERANCE


def test_scale_multiplies_the_gradient_and_accumulates(model) -> None:
    _, once = run_step(model, objective_config())
    config = objective_config()
    from repbend_fast.objectives import build_objective

    model.zero_grad(set_to_none=True)
    runner = runner_on(model, Levers())
    for scale in (0.25, 0.75):
        for stream in build_objective(config, BLOCKS).streams(BATCH, 0):
            runner.backward(stream, scale, dropout_seed=0)
    assert_matches(flat(gradients(model)), flat(once), tolerance=TOLERANCE)


def test_measure_gives_the_same_terms_without_a_gradient(model) -> None:
    from repbend_fast.objectives import build_objective

    config = objective_config(pair=0.4)
    results, _ = run_step(model, config)
    model.zero_grad(set_to_none=True)
    state = torch.get_rng_state()
    runner = runner_on(model, Levers())
    for stream in build_objective(config, BLOCKS).streams(BATCH, 0):
        measured = runner.measure(stream)
        assert measured.terms.keys() == results[stream.name].terms.keys()
        for name, value in measured.terms.items():
            assert_matches(value, results[stream.name].terms[name], tolerance=1e-6, name=name)
        assert measured.tokens == sum(len(s) for s in stream.sequences)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_layer_distances_average_to_the_term(model) -> None:
    results, _ = run_step(model, objective_config(alpha_mode="target"))
    for name in ("safe", "unsafe"):
        layers = results[name].layers[name]
        assert sorted(layers) == [2, 3]
        assert_matches(torch.stack(list(layers.values())).mean(), results[name].terms[name], tolerance=1e-6)


@pytest.mark.parametrize("packing", LAYOUTS)
@pytest.mark.parametrize("checkpointed", [0, "all"])
def test_dropout_of_split_pieces_is_that_of_their_rows(packing, checkpointed) -> None:
    """The gradient of the split cosine equals autograd of the exact C over the same pieces with the same masks."""
    from repbend_fast.models import find_decoder, run_decoder
    from repbend_fast.models.layers.lora import lora_dropout
    from repbend_fast.objectives import build_objective
    from repbend_fast.step.dropout_keys import row_keys
    from repbend_fast.step.pieces import make_piece, split

    model = adapted_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3}))
    config = objective_config(safe=0, unsafe=0, kl=0, cosine=1.0)
    memory = MemoryConfig(piece_tokens=20, packing=packing, checkpoint_blocks=checkpointed)
    state = torch.get_rng_state()
    results, got = run_step(model, config, memory=memory, seed=3)
    assert torch.equal(state, torch.get_rng_state())

    (stream,) = build_objective(config, BLOCKS).streams(BATCH, 0)
    layout = "packed" if packing == "on" else "padded"
    groups = split(stream.sequences, memory.piece_tokens, layout)
    assert len(groups) > 1
    states: dict[int, dict[int, Tensor]] = {layer: {} for layer in config.window}
    model.zero_grad(set_to_none=True)
    for members in groups:
        piece = make_piece(stream.sequences, members, layout, torch.device("cpu"))

        def visit(layer, hidden, piece=piece, members=members):
            for member, offset in zip(members, piece.offsets):
                if layer in states:
                    states[layer][member] = hidden.reshape(-1, hidden.shape[-1])[
                        offset + stream.term("cosine").positions[member]
                    ]
            return hidden

        with lora_dropout(model, row_keys(piece, 3, "unsafe")):
            run_decoder(
                find_decoder(model),
                piece.input_ids,
                packed=piece.packed,
                stop=max(config.window),
                visit=visit,
            )
    count = len(stream.sequences)
    values = [
        1 - torch.cosine_similarity(states[layer][i], states[layer][j], dim=0)
        for layer in states
        for i in range(count)
        for j in range(count)
        if i != j
    ]
    exact = torch.stack(values).mean()
    exact.backward()
    assert_matches(results["unsafe"].terms["cosine"], exact.detach(), tolerance=1e-5)
    assert_matches(flat(got), flat(gradients(model)), tolerance=5e-5)

    _, other = run_step(model, config, memory=memory, seed=4)
    assert relative_l2(flat(other), flat(got)) > 1e-2


def test_the_limit_of_these_cases_lies_among_the_distances(precise) -> None:
    with torch.no_grad():
        distances, farthest = limited_rows(precise, BATCH, objective_config(unsafe_limit=LIMIT))
    assert 0.2 < (distances > farthest).float().mean().item() < 0.8
