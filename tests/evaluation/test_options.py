"""``NAME:key=value,…`` by the constructor's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from repbend_fast.errors import UserError
from repbend_fast.evaluation.options import Catalog

Profile = Literal["small", "large"]


class Plain:
    def __init__(
        self, *, url: str = "", tokens: tuple[int, ...] = (4, 16), on: bool = True, most: int | None = 8
    ) -> None:
        if most == 13:
            raise ValueError("13 brings no luck")
        self.url, self.tokens, self.on, self.most = url, tokens, on, most


@dataclass(frozen=True)
class Data:
    name: ClassVar[str] = "data"
    steps: int = 500
    rate: float = 1e-3
    profile: Profile = "small"
    folder: Any = field(default=None, init=False)


class Pydantic(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int = 3
    label: str = "x"


CATALOG = Catalog(
    "attack",
    {
        "plain": f"{__name__}:Plain",
        "data": f"{__name__}:Data",
        "pydantic": f"{__name__}:Pydantic",
        "later": "repbend_fast.evaluation.attacks.not_written_yet:Later",
    },
)


def test_one_whose_module_is_not_there_is_not_listed() -> None:
    assert CATALOG.names() == ["plain", "data", "pydantic"]
    with pytest.raises(UserError, match="--attack later: no such attack; there are plain, data, pydantic"):
        CATALOG.find("later")


def test_settings_have_the_constructor_s_types() -> None:
    named = CATALOG.find("plain:url=http://localhost:8000/v1?a=b,tokens=1,2,3,on=false,most=none")
    plain = named.make()
    assert (plain.url, plain.tokens, plain.on, plain.most) == ("http://localhost:8000/v1?a=b", (1, 2, 3), False, None)
    assert named.label == "plain:url=http://localhost:8000/v1?a=b,tokens=1,2,3,on=false,most=none"
    data = CATALOG.find("data:rate=1e-2,steps=64,profile=large").make()
    assert (data.steps, data.rate, data.profile, data.folder) == (64, 0.01, "large", None)
    assert CATALOG.find("pydantic:label=7").make().label == "7"


def test_defaults_that_are_spelled_out_are_no_other_attack() -> None:
    assert CATALOG.find("data:steps=500,rate=0.001").label == "data"
    assert CATALOG.find("data:rate=0.1,steps=2").label == CATALOG.find("data:steps=2,rate=0.1").label


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dota", "--attack dota: no such attack; there are plain, data, pydantic; did you mean data?"),
        ("data:stps=3", "--attack data: unknown setting stps; it has steps, rate, profile; did you mean steps?"),
        ("data:folder=x", "unknown setting folder"),
        ("data:steps=many", "--attack data: steps=many: "),
        ("data:profile=huge", "--attack data: profile=huge: "),
        ("data:steps", "--attack data: 'steps' is no key=value"),
        ("plain:tokens=1,x", "--attack plain: tokens=1,x: "),
        ("plain:on=maybe", "--attack plain: on=maybe: "),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        CATALOG.find(text)
    assert words in str(caught.value)


def test_what_the_constructor_refuses_is_named() -> None:
    with pytest.raises(UserError, match="plain:most=13: 13 brings no luck"):
        CATALOG.find("plain:most=13").make()
