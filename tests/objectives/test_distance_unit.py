"""Distances in units of the reference: the same losses on a model whose residual stream is longer, and nothing else
changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import ALL_CONFIGS, BATCH, BLOCKS, STEP, STEPS, precise_model
from tiny_models import adapted_model, flat, gradients, ragged_batch, runner_on
from torch import Tensor

from repbend_fast.errors import UserError
from repbend_fast.objectives import Distance, Stream, build_objective
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.step import StreamResult, StreamRunner
from repbend_fast.step.levers import EVERY_STREAM, Levers
from repbend_fast.step.units import measure_units

SETS = {"safe": BATCH.safe, "unsafe": BATCH.unsafe, "pair": BATCH.pairs, "retain": BATCH.retain}
WITHOUT_UNIT = {"npo", "simnpo", "wga", "sat_imp", "undial", "ce_u"}  # nothing in them is a distance
WITH_UNIT = {name: config for name, config in ALL_CONFIGS.items() if name not in WITHOUT_UNIT}
LIMITED = RepBendConfig(
    window_start=2, window_size=3, pair=0.4, unsafe_limit=0.5, alpha_mode="target", kl_reduction="token"
)
SMALL_MARGINS = CRLConfig(window_start=2, window_size=2, safe_margin=0.3, unsafe_margin=0.02)
CASES: dict[str, MethodConfig] = {**ALL_CONFIGS, "repbend limited": LIMITED, "crl small margins": SMALL_MARGINS}


def in_unit(config: MethodConfig, unit: str) -> MethodConfig:
    return config.model_copy(update={"distance_unit": unit}) if "distance_unit" in type(config).model_fields else config


def run(
    model: Any, config: MethodConfig, *, piece_tokens: int | None = None, packing: Any = "off", measure: bool = False
) -> tuple[dict[str, StreamResult], dict[str, Tensor], dict[int, float]]:
    """Results by stream, gradients, and the units that were measured."""
    model.zero_grad(set_to_none=True)
    objective = build_objective(config, BLOCKS, STEPS)
    levers = Levers({} if piece_tokens is None else {EVERY_STREAM: piece_tokens}, 0, packing=packing)
    runner = runner_on(model, levers, uses_head=objective.uses_head)
    runner.units.update(measure_units(runner, objective, SETS))  # type: ignore[arg-type]
    streams = objective.streams(BATCH, STEP)
    results = {s.name: runner.measure(s) if measure else runner.backward(s, dropout_seed=0) for s in streams}
    results |= {f"probe {s.name}": runner.measure(s) for s in objective.probes(BATCH)}
    return results, gradients(model), dict(runner.units)


def stretch(model: Any, factor: float) -> Any:
    """The same function with a residual stream ``factor`` times as long: what enters it is scaled, and the norms'
    epsilon with it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            into_stream = "embed_tokens" in name or "o_proj" in name or "down_proj" in name
            if into_stream and "lora_A" not in name:
                parameter.mul_(factor)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= factor**2
    return model


def terms_of(results: dict[str, StreamResult]) -> dict[str, Tensor]:
    return {f"{stream} {name}": value for stream, result in results.items() for name, value in result.terms.items()}


@pytest.mark.parametrize("factor", [1 / 16, 16])
@pytest.mark.parametrize("case", CASES)
def test_a_longer_residual_stream_changes_no_term(case: str, factor: float) -> None:
    config = in_unit(CASES[case], "reference")
    expected, expected_gradient, units = run(adapted_model(), config)
    found, gradient, stretched_units = run(stretch(adapted_model(), factor), config)
    assert units.keys() == stretched_units.keys()
    assert bool(units) == (case not in WITHOUT_UNIT)
    for layer, unit in units.items():
        # The last hidden state lies behind the final norm, which takes the factor out again.
        assert stretched_units[layer] == pytest.approx(unit * (1 if layer == BLOCKS else factor), rel=1e-5)
    terms = terms_of(found)
    for name, value in terms_of(expected).items():
        assert abs(value.item()) > 1e-4, name  # an ascent is below 0
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for stream, result in expected.items():
        assert found[stream].loss.item() == pytest.approx(result.loss.item(), rel=1e-4), stream
    # B of what writes into the stream is itself longer by the factor, so its gradient is shorter.
    scaled = {
        n: g * factor if "lora_B" in n and ("o_proj" in n or "down_proj" in n) else g for n, g in gradient.items()
    }
    assert_matches(flat(scaled), flat(expected_gradient), tolerance=1e-4, name="gradient")
    for wrong in (
        torch.zeros_like(flat(scaled)),
        -flat(scaled),
        flat({n: g.roll(1, dims=0) for n, g in scaled.items()}),
        flat(gradient),
    ):
        assert relative_l2(wrong, flat(expected_gradient)) > 0.1


@pytest.mark.parametrize("case", WITH_UNIT)
def test_in_units_of_the_state_the_terms_follow_the_stream(case: str) -> None:
    """Otherwise the test above would hold for any distances."""
    expected, _, units = run(adapted_model(), WITH_UNIT[case])
    found, _, _ = run(stretch(adapted_model(), 16), WITH_UNIT[case])
    assert units == {}
    ratios = [terms_of(found)[name] / value for name, value in terms_of(expected).items()]
    assert max(ratios) > 3


def test_the_unit_is_the_median_norm_of_the_reference_s_rows() -> None:
    model = adapted_model()
    _, _, units = run(model, in_unit(RepBendConfig(window_start=2, window_size=2, alpha_mode="target"), "reference"))
    norms: dict[int, list[Tensor]] = {2: [], 3: []}
    for s in (*BATCH.safe, *(p.safe for p in BATCH.pairs), *BATCH.unsafe, *(p.unsafe for p in BATCH.pairs)):
        with torch.no_grad(), model.disable_adapter():
            states = model(torch.tensor([s.ids]), output_hidden_states=True).hidden_states
        for layer, found in norms.items():
            found.append(states[layer][0, s.prompt_length :].norm(dim=-1))
    assert units == {layer: pytest.approx(torch.cat(found).median().item(), rel=1e-6) for layer, found in norms.items()}


@pytest.mark.parametrize(("piece_tokens", "packing"), [(13, "off"), (13, "on"), (None, "on")])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_UNIT])
def test_pieces_change_neither_units_nor_gradient(case: str, piece_tokens: int | None, packing: str) -> None:
    config, model = in_unit(CASES[case], "reference"), precise_model()
    expected, gradient, units = run(model, config)
    found, other, other_units = run(model, config, piece_tokens=piece_tokens, packing=packing)
    assert other_units == pytest.approx(units, rel=1e-6)
    for name, value in terms_of(expected).items():
        assert terms_of(found)[name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert_matches(flat(other), flat(gradient), tolerance=1e-6, name="gradient")


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_UNIT])
def test_gradient_equals_finite_differences(case: str) -> None:
    config, model = in_unit(CASES[case], "reference"), precise_model()
    _, found, _ = run(model, config)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    losses = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(direction[n], alpha=sign * 1e-6)
        results = run(model, config, measure=True)[0]
        losses.append(sum(float(r.loss) for name, r in results.items() if not name.startswith("probe")))
    expected = sum(float((found[n] * direction[n]).sum()) for n in parameters)
    assert abs(expected) > 1e-6
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_distance_at_the_start_is_zero(packing: str) -> None:
    results, _, units = run(adapted_model(trained=False), in_unit(ALL_CONFIGS["repbend"], "reference"), packing=packing)
    assert units
    for stream in ("safe", "unsafe"):
        assert {float(v) for v in results[stream].layers[stream].values()} == {0.0}


def test_what_is_known_stays_and_only_what_lacks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_objective(in_unit(RepBendConfig(window_start=2, window_size=2), "reference"), BLOCKS)
    runner = runner_on(adapted_model(), Levers({}, 0, packing="off"), uses_head=False)
    units = measure_units(runner, objective, SETS)  # type: ignore[arg-type]
    known = {layer: -1.0 for layer in units if layer != 3}
    assert measure_units(runner, objective, SETS, known) == {**known, 3: units[3]}  # type: ignore[arg-type]
    monkeypatch.setattr(StreamRunner, "reference_rows", lambda *_: pytest.fail("a unit was measured again"))
    assert measure_units(runner, objective, SETS, units) == units  # type: ignore[arg-type]


def test_a_unit_of_zero_is_one_line() -> None:
    model = adapted_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    config = in_unit(RepBendConfig(window_start=1, window_size=1, alpha_mode="target"), "reference")
    with pytest.raises(UserError, match="hidden state 1 is 0, which cannot be a unit; set distance_unit=state"):
        run(model, config)


def test_a_custom_term_may_ask_for_the_unit_and_must_then_have_one() -> None:
    sequences = ragged_batch().safe
    spans = tuple((0, len(s)) for s in sequences)
    rows = sum(map(len, sequences))
    runner = runner_on(adapted_model(), Levers({}, 0, packing="off"), uses_head=False)
    plain, own = (
        Stream("own", sequences, (Distance("push", (2,), spans, 1.0, rows, kind="mse", unit=u),))
        for u in ("state", "reference")
    )
    with pytest.raises(ValueError, match="that of hidden state 2 was not measured"):
        runner.measure(own)
    runner.units[2] = 4.0
    found, expected = runner.measure(own), runner.measure(plain)
    assert found.loss.item() == pytest.approx(expected.loss.item() / 16, rel=1e-6)
    assert found.layers["push"][2].item() == pytest.approx(expected.layers["push"][2].item() / 16, rel=1e-6)
