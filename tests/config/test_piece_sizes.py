"""``memory.piece_tokens`` by stream: the names are those that objectives declare."""

from __future__ import annotations

import pytest

from repbend_fast.config import load_config
from repbend_fast.errors import UserError
from repbend_fast.objectives.registry import SETTINGS

RECIPE = "mistral-7b-instruct-v0.2"


def load(*overrides: str):
    return load_config(RECIPE, overrides)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_stream_that_a_method_declares_has_a_size(name: str) -> None:
    streams = SETTINGS[name].stream_names
    assert streams
    sizes = {stream: 100 + number for number, stream in enumerate(streams)}
    config = load(f"objective.name={name}", f"memory.piece_tokens={sizes}".replace("'", ""))
    assert config.memory.piece_tokens == sizes


def test_a_recipe_may_name_the_streams_of_the_methods_that_it_is_compared_with() -> None:
    config = load("objective.name=rmu", "memory.piece_tokens={forget: 100, triplet: 200}")
    assert config.memory.piece_tokens == {"forget": 100, "triplet": 200}


def test_an_objective_of_one_s_own_names_its_streams_itself() -> None:
    config = load("objective={name: 'own_term:Small'}", "memory.piece_tokens={shrunk: 100}")
    assert config.memory.piece_tokens == {"shrunk": 100}


def test_a_stream_that_nothing_has_is_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"memory\.piece_tokens\.unsave: objective repbend has no such stream; it has safe, unsafe, retain, "
        r"refusal",
    ):
        load("memory.piece_tokens={unsave: 100}")
    with pytest.raises(UserError, match="at least 1"):
        load("memory.piece_tokens={unsafe: 0}")
