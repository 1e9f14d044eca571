"""A method is one file: what it registers is all that configuration, report and verification know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
from pydantic import TypeAdapter

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives import Probes, Stream, build_objective, roles_of
from repbend_fast.objectives.registry import (
    OBJECTIVES,
    SETTINGS,
    any_settings,
    method,
    section_of,
    stream_names,
    titles_of,
)
from repbend_fast.objectives.sections import MethodConfig


class ToyConfig(MethodConfig):
    """Settings of a method that the package does not have."""

    place: ClassVar[int] = 0
    stream_names: ClassVar[tuple[str, ...]] = ("toys",)
    titles: ClassVar[dict[str, str]] = {"toy": "toy: kept short", "safe": "safe: toyed with"}

    name: Literal["toy"] = "toy"
    length: int = 3

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("retain",)


class Toy:
    """Has no streams."""

    uses_head = False
    last_state = 1

    def __init__(self, config: ToyConfig, num_blocks: int, steps: int | None, seed: int | None) -> None:
        self.made = (config.length, num_blocks, steps, seed)
        self.roles = config.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        return []

    def probes(self, batch: Batch) -> Probes:
        return Probes()


@pytest.fixture
def toy() -> Iterator[None]:
    method(ToyConfig)(Toy)
    yield
    del SETTINGS["toy"], OBJECTIVES["toy"]


def test_settings_that_do_not_say_their_roles_cannot_be_made() -> None:
    class Roleless(MethodConfig):
        name: Literal["roleless"] = "roleless"

    for make in (Roleless, lambda: TypeAdapter(Roleless).validate_python({"name": "roleless"})):
        with pytest.raises(TypeError, match=r"abstract.*roles"):
            make()


def test_the_section_of_a_configuration_takes_it(toy: None) -> None:
    section = TypeAdapter[Any](any_settings()).validate_python({"name": "toy", "length": 5})
    assert section == ToyConfig(length=5)
    assert section_of("toy") is ToyConfig
    objective: Any = build_objective(section, 4, 10, 7)
    assert objective.made == (5, 4, 10, 7)
    assert roles_of(section) == ("retain",)


def test_lists_have_it_in_its_place(toy: None) -> None:
    assert (
        list(SETTINGS)
        == list(OBJECTIVES)
        == [
            "toy",
            "repbend",
            "circuit_breaker",
            "rmu",
            "npo",
            "crl",
            "simnpo",
            "wga",
            "sat_imp",
            "x_boundary",
            "undial",
            "ce_u",
            "lat",
        ]
    )
    assert "toys" in stream_names()


def test_its_titles_come_first_and_those_of_others_after(toy: None) -> None:
    titles = titles_of("toy")
    assert list(titles)[:2] == ["toy", "safe"]
    assert titles["safe"] == "safe: toyed with"
    assert titles["nll"] == titles_of("npo")["nll"]
    assert titles_of("crl")["safe"] == "safe: triplet loss"
    assert titles_of("mine:Own")["unsafe"] == titles_of("repbend")["unsafe"]


def test_every_class_of_settings_is_named_like_one() -> None:
    assert all(settings.__name__.endswith("Config") for settings in SETTINGS.values())
    assert {settings.__bases__[0].__name__.endswith("Config") for settings in SETTINGS.values()} == {True}


def test_what_a_method_wants_of_lora_is_its_own_to_say() -> None:
    wanted = {name: settings.wanted_lora({}) for name, settings in SETTINGS.items()}
    assert [name for name, found in wanted.items() if found] == ["rmu"]
    assert SETTINGS["rmu"].wanted_lora({"layer": 2}) == {"target_modules": ["down_proj"], "blocks": [0, 1]}
    assert SETTINGS["rmu"].wanted_lora({"layer": "auto"})["blocks"] == "last_three"
    assert SETTINGS["rmu"].wanted_lora({"layer": "eight"}) == {}
