"""Hidden states as a share of the model's depth."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from repbend_fast.config import load_config, resolved_yaml
from repbend_fast.config.schema import LoraConfig, at_depth
from repbend_fast.errors import UserError
from repbend_fast.models.adapters import adapted_blocks
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.rmu import RMUConfig


@pytest.mark.parametrize(
    ("num_blocks", "window"),
    [
        (32, range(20, 31)),
        (30, range(19, 29)),
        (16, range(10, 16)),
        (80, range(50, 78)),
        (4, range(3, 4)),
        (2, range(1, 2)),
        (1, range(1, 2)),
    ],
)
@pytest.mark.parametrize("section", [RepBendConfig, CRLConfig])
def test_the_published_window_as_a_share_of_depth(section: type, num_blocks: int, window: range) -> None:
    resolved = section(window_start="auto", window_size="auto").at_depth(num_blocks)
    assert resolved.window == tuple(window)
    assert resolved.last_state <= num_blocks
    assert build_objective(section(window_start="auto", window_size="auto"), num_blocks).last_state == window[-1]


@pytest.mark.parametrize("num_blocks", range(1, 130))
def test_every_depth_has_a_window_inside_it(num_blocks: int) -> None:
    window = RepBendConfig(window_start="auto", window_size="auto").at_depth(num_blocks).window
    assert 1 <= min(window) <= max(window) <= num_blocks
    assert max(RMUConfig(layer="auto").at_depth(num_blocks).last_state, 1) <= num_blocks
    assert CircuitBreakerConfig(layers="auto").at_depth(num_blocks).last_state <= num_blocks


def test_the_other_methods_states() -> None:
    assert [CircuitBreakerConfig(layers="auto").at_depth(n).layers for n in (32, 30, 1)] == [[10, 20], [9, 19], [1]]
    assert [RMUConfig(layer="auto").at_depth(n).layer for n in (32, 30, 16, 1)] == [8, 8, 4, 1]


def test_numbers_stay_as_they_are_and_fill_up_with_shares() -> None:
    assert RepBendConfig().at_depth(64) == RepBendConfig()
    assert RepBendConfig(window_start=5, window_size="auto").at_depth(32).window == tuple(range(5, 16))
    assert RepBendConfig(window_start="auto", window_size=2).at_depth(32).window == (20, 21)
    with pytest.raises(ValueError, match="at_depth"):
        _ = RepBendConfig(window_start="auto").window
    with pytest.raises(ValidationError):
        RepBendConfig(window_start="third")  # type: ignore[arg-type]


def test_a_recipe_s_numbers_give_way_to_auto_and_auto_to_numbers(tmp_path) -> None:
    auto = load_config("demo", ["objective.window=auto"])
    assert (auto.objective.window_start, auto.objective.window_size) == ("auto", "auto")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: demo\nobjective:\n  window: auto\n  safe: 2.0\n", encoding="utf-8")
    assert load_config(str(recipe)).objective.window_start == "auto"
    assert load_config(str(recipe), ["window_start=4"]).objective.window_start == 4
    recipe.write_text(resolved_yaml(auto), encoding="utf-8")
    assert load_config(str(recipe)) == auto
    assert at_depth(auto, 30).objective.window == tuple(range(19, 29))
    with pytest.raises(UserError, match=r"unknown key objective\.window_start"):
        load_config("demo", ["objective.name=npo", "window=auto"])


def test_rmu_s_blocks_follow_its_layer(tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name: M}\ndata: {sources: [x]}\nobjective: {name: rmu, layer: auto}\n", encoding="utf-8")
    lora = load_config(str(recipe)).lora
    assert (lora.blocks, lora.target_modules) == ("last_three", ["down_proj"])
    assert [adapted_blocks(lora, *n) for n in ((8, 32), (2, 4), (4, 4))] == [[5, 6, 7], [0, 1], [1, 2, 3]]
    assert adapted_blocks(LoraConfig(), 3, 4) == adapted_blocks(LoraConfig(), 4, 4) == [0, 1, 2, 3]


def test_the_recipe_for_any_model_asks_for_model_and_data_and_nothing_else() -> None:
    needed = ["model.name=org/some-model", "data.sources=mine.jsonl"]
    for missing in (0, 1):
        with pytest.raises(UserError) as caught:
            load_config("any", needed[1 - missing : 2 - missing])
        assert (
            str(caught.value)
            == (
                "any.yaml: model.name is missing; set it in a recipe or as model.name=VALUE; it must be text",
                "any.yaml: data is missing; set data.sources, which must be a list of sources, at least 1",
            )[missing]
        )
    config = load_config("any", needed)
    objective = config.objective
    assert isinstance(objective, RepBendConfig)
    assert (objective.window_start, objective.window_size, objective.distance_unit) == ("auto", "auto", "reference")
    assert objective.unsafe_limit is not None
    assert objective.kl_reduction == "token"
    assert config.validation.every
    assert config.validation.patience > 1
    assert [source.path for source in config.data.sources] == ["mine.jsonl"]
