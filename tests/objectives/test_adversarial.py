"""Latent adversarial training: the search against its plain form, perturbed streams against theirs, and that neither
pieces nor a second run change anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import objective_oracles as oracles
import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import ATTACK, BATCH, BLOCKS, SEARCHING, precise_model, run_objective
from objective_runs import ATTACKED as BY_NAME
from tiny_models import WITHOUT_DROPOUT, adapted_model, flat, gradients, runner_on
from tiny_models import pair as pair_of
from torch import Tensor
from torch.nn import functional as F

from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder
from repbend_fast.models.perturbation import visiting
from repbend_fast.objectives import Stream, build_objective
from repbend_fast.objectives.adversarial import AdversarialConfig
from repbend_fast.objectives.lat import LATConfig
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.step.levers import EVERY_STREAM, Levers
from repbend_fast.step.runner import _Run
from repbend_fast.step.searched import Found
from repbend_fast.step.units import measure_units

LAT = SEARCHING["lat"]
ATTACKED = {name.removesuffix(", attacked"): config for name, config in BY_NAME.items()}
FACTOR = 2.0


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model()


def streams_of(config: MethodConfig) -> dict[str, Stream]:
    return {s.name: s for s in build_objective(config, BLOCKS, 10).streams(BATCH, 2)}


def found_by(model: Any, stream: Stream, **levers: Any) -> Found:
    """What the stream's search finds."""
    runner = runner_on(model, Levers(**levers))
    assert stream.search is not None
    return runner._search(_Run(stream), stream.search)


def plain_loss(model: Any, deltas: dict[int, list[Tensor]], answers: str) -> Tensor:
    """½ CE of the answers ``towards`` and ½ −log(1 − p) of the others, sequence by sequence, each perturbed."""
    towards, away = [], []
    for number, pair in enumerate(BATCH.pairs):
        for half, sequence in (("safe", pair.safe), ("unsafe", pair.unsafe)):
            p = sequence.prompt_length

            def visit(state: int, hidden: Tensor, number: int = number, p: int = p) -> Tensor:
                if state not in deltas:
                    return hidden
                return hidden + F.pad(deltas[state][number], (0, 0, 0, hidden.shape[1] - p))[None]

            with visiting(model, visit):
                logits = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0].log_softmax(-1)
            log_p = torch.stack([logits[t - 1, sequence.ids[t]] for t in range(p, len(sequence))])
            if half == answers:
                towards.append(-log_p)
            else:
                away.append(-torch.log(1 - log_p.exp()))
    return 0.5 * torch.cat(towards).mean() + 0.5 * torch.cat(away).mean()


def plain_search(model: Any, config: LATConfig) -> dict[int, list[Tensor]]:
    """Adam's steps written out, each row shortened to the radius."""
    width, states = model.config.hidden_size, config.states_of(BLOCKS)
    deltas = {
        s: [torch.zeros(p.unsafe.prompt_length, width, dtype=torch.float64, requires_grad=True) for p in BATCH.pairs]
        for s in states
    }
    rows = [row for state in states for row in deltas[state]]
    first, second = ([torch.zeros_like(row) for row in rows] for _ in range(2))
    for step in range(1, config.search_steps + 1):
        found = torch.autograd.grad(plain_loss(model, deltas, "unsafe"), rows)
        with torch.no_grad():
            for row, gradient, m, v in zip(rows, found, first, second):
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).add_(gradient.square(), alpha=0.001)
                row.mul_(1 - 0.01 * config.step_size)  # the weight decay of AdamW
                row -= config.step_size * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                row.div_((row.norm(dim=-1, keepdim=True) / config.radius).clamp(min=1))
    return deltas


@pytest.mark.parametrize("pieces", [None, 24], ids=["one piece", "split"])
def test_lat_equals_its_plain_form(precise, pieces) -> None:
    assert isinstance(LAT, LATConfig)
    expected = plain_search(precise, LAT)
    stream = streams_of(LAT)["perturbed"]
    levers = {} if pieces is None else {"piece_tokens": {EVERY_STREAM: pieces}}
    deltas = found_by(precise, stream, **levers).deltas
    for number in range(len(BATCH.pairs)):
        for state in (0, 2):
            assert_matches(deltas[number][state], expected[state][number].detach(), tolerance=1e-7, name="δ")
    precise.zero_grad(set_to_none=True)
    fixed = {state: [row.detach() for row in rows] for state, rows in expected.items()}
    loss = plain_loss(precise, fixed, "safe")
    retain = oracles.Passes(precise, list(BATCH.retain))
    rows = retain.real & F.pad(retain.real[:, 1:], (0, 1))  # those that predict a token
    (loss + LAT.kl * retain.kl(rows, 1.0) / rows.sum()).backward()
    plain = gradients(precise)
    results, got = run_objective(precise, LAT, piece_tokens=pieces)
    assert_matches(results[0].loss, loss.detach(), tolerance=1e-7, name="loss")
    assert_matches(flat(got), flat(plain), tolerance=1e-7, name="gradient")
    for wrong in (torch.zeros_like(flat(got)), -flat(got), flat({n: g.roll(1, dims=0) for n, g in got.items()})):
        assert relative_l2(wrong, flat(plain)) > 0.1


@pytest.mark.parametrize("name", ATTACKED)
def test_pieces_change_nothing(precise, name) -> None:
    """Terms that couple sequences too: a first pass is perturbed as the pieces are."""
    packing = "on" if name == "repbend" else "off"
    whole, expected = run_objective(precise, ATTACKED[name], packing=packing)
    split, got = run_objective(precise, ATTACKED[name], packing=packing, piece_tokens=24, checkpoint_blocks=BLOCKS)
    assert_matches(flat(got), flat(expected), tolerance=1e-7)
    for one, other in zip(split, whole, strict=True):
        assert_matches(one.loss, other.loss, tolerance=1e-7)


@pytest.mark.parametrize("name", ["repbend", "crl"])
def test_the_perturbed_copies_are_added(precise, name) -> None:
    """The gradient is that of the method and of its copies, which are other streams under their own names."""
    plain = ATTACKED[name].model_copy(update={"adversarial": AdversarialConfig()})
    with_copies, without = streams_of(ATTACKED[name]), streams_of(plain)
    added = with_copies.keys() - without.keys()
    assert added
    assert all(n.startswith("perturbed_") for n in added)
    assert "perturbed_refusal" in added
    for n in added:
        source, copy = without[n.removeprefix("perturbed_")], with_copies[n]
        assert copy.sequences == source.sequences
        assert copy.weights == pytest.approx({f"perturbed_{k}": 0.5 * w for k, w in source.weights.items()})
    results, together = run_objective(precise, ATTACKED[name])
    _, alone = run_objective(precise, plain)
    assert relative_l2(flat(together), flat(alone)) > 1e-2
    names = [term for r in results for term in r.terms]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ATTACKED)
def test_pairs_that_are_only_refused_are_perturbed_too(precise, name) -> None:
    """Towards their own unsafe answers: each prompt's rows are those of a batch that bends the pair as well."""
    more = (pair_of(5, 4, 3, 11), pair_of(2, 5, 7, 12))
    batch = replace(BATCH, refused=more)
    stream, both = (
        {s.name: s for s in build_objective(ATTACKED[name], BLOCKS, 10).streams(b, 2)}["perturbed_refusal"]
        for b in (batch, replace(BATCH, pairs=(*BATCH.pairs, *more)))
    )
    assert len(stream.sequences) == len(BATCH.pairs) + len(more)
    assert stream.search == both.search
    whole, expected = run_objective(precise, ATTACKED[name], batch=batch)
    _, got = run_objective(precise, ATTACKED[name], batch=batch, piece_tokens=24)
    assert_matches(flat(got), flat(expected), tolerance=1e-7)
    few, _ = run_objective(precise, ATTACKED[name])
    assert [r.terms.keys() for r in few] == [r.terms.keys() for r in whole]


@pytest.mark.parametrize("name", ["lat", "repbend"])
def test_a_search_changes_its_loss_by_a_factor(name) -> None:
    """What is attacked (the negative log-likelihood of the answers to be kept off, likeness of those to be given) falls
    to less than half.
    """
    config = LAT if name == "lat" else ATTACKED[name]
    strong = {"radius": 4.0, "search_steps": 24, "step_size": 0.2}
    changed = {**strong} if name == "lat" else {"adversarial": ATTACK.model_copy(update=strong)}
    model = adapted_model(lora=WITHOUT_DROPOUT)
    runner = runner_on(model, Levers())
    for stream in streams_of(config.model_copy(update=changed)).values():
        if stream.search is None:
            continue
        unperturbed = Stream("before", stream.search.sequences, stream.search.terms)
        before = float(runner.measure(unperturbed).loss)
        after = float(runner.measure(stream.attacked).loss)
        assert after < before / FACTOR, stream.name
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_perturbed_distance_is_zero_at_the_start(dtype) -> None:
    model = adapted_model(dtype=dtype, lora=WITHOUT_DROPOUT, trained=False)
    for pieces in (None, 24):
        runner = runner_on(model, Levers({} if pieces is None else {EVERY_STREAM: pieces}))
        stream = streams_of(ATTACKED["repbend"])["perturbed_unsafe"]
        result = runner.backward(stream, dropout_seed=0)
        assert float(result.terms["perturbed_unsafe"]) == 0.0
        moved = found_by(model, stream).deltas
        assert all(float(d.abs().max()) > 0.05 for of_prompt in moved.values() for d in of_prompt.values())


def test_rows_stay_in_the_ball_and_a_search_is_the_same_again() -> None:
    model = adapted_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3}))
    stream = streams_of(LAT)["perturbed"]
    once, again = found_by(model, stream), found_by(model, stream)
    for number, of_prompt in once.deltas.items():
        for state, rows in of_prompt.items():
            assert torch.equal(rows, again.deltas[number][state])
            assert rows.shape == (BATCH.pairs[number].unsafe.prompt_length, model.config.hidden_size)
            assert float(rows.norm(dim=-1).max()) <= 0.5 * (1 + 1e-6)
            assert float(rows.norm(dim=-1).max()) > 0.45


def test_radius_and_steps_count_in_the_reference_s_units() -> None:
    model = adapted_model(lora=WITHOUT_DROPOUT)
    config = LAT.model_copy(update={"distance_unit": "reference"})
    stream = streams_of(config)["perturbed"]
    runner = runner_on(model, Levers())
    runner.units.update({0: 0.1, 2: 10.0})
    deltas = runner._search(_Run(stream), stream.search).deltas[0]
    for state, radius in ((0, 0.05), (2, 5.0)):
        assert float(deltas[state].norm(dim=-1).max()) == pytest.approx(radius, rel=1e-4)
    assert [t.layers for t in stream.search.measured] == [(0, 2)]


@pytest.mark.parametrize("states", [[0], [0, 2]])
def test_every_perturbed_state_has_a_unit(states) -> None:
    """The embedding's output alone too, before which no block runs."""
    model = adapted_model(lora=WITHOUT_DROPOUT)
    objective = build_objective(LAT.model_copy(update={"distance_unit": "reference", "states": states}), BLOCKS, 10)
    units = measure_units(runner_on(model, Levers()), objective, {"pair": BATCH.pairs, "retain": BATCH.retain})
    assert units.keys() == set(states)
    rows = torch.cat(
        [model.get_input_embeddings().weight[list(p.unsafe.ids[: p.unsafe.prompt_length])] for p in BATCH.pairs]
    )
    assert units[0] == pytest.approx(float(rows.norm(dim=-1).median()), rel=1e-5)


def test_states_as_a_share_of_depth() -> None:
    assert LATConfig().states_of(32) == (0, 8, 16, 24, 30)
    assert LATConfig().states_of(30) == (0, 8, 15, 23, 28)
    assert LATConfig().states_of(4) == (0, 1, 2, 3)
    with pytest.raises(UserError, match=r"states=\[4\]: hidden states of this model that can be perturbed are 0 … 3"):
        build_objective(LATConfig(states=[4]), BLOCKS, 1)


def test_blocks_of_the_model_are_as_before(precise) -> None:
    blocks = list(find_decoder(precise).layers)
    run_objective(precise, LAT)
    assert list(find_decoder(precise).layers) == blocks
