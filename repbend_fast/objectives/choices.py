"""Settings that several methods have, with their values and what is said of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from repbend_fast.section import AboveZero, Positive

AnswerMode = Annotated[
    Literal["prompt_response", "response_all", "assistant_turns"],
    Field(
        description="Rows that the bending terms read: all, the answers', or those of every turn of the assistant. "
        "Prompts share a template, which ordinary ones need too."
    ),
]
PROMPT_MODES = ("prompt_last", "prompt_all")
"""The loss modes that read no answers."""


def _prompt_mode(value: object) -> object:
    """RepBend's published code says ``request_…`` where its README says ``prompt_…``."""
    code = isinstance(value, str) and value.startswith("request_")
    return str(value).replace("request_", "prompt_", 1) if code else value


RowMode = Annotated[
    Literal["prompt_last", "prompt_all", "prompt_response", "response_all", "assistant_turns"],
    BeforeValidator(_prompt_mode),
    Field(description="Which tokens' states count."),
]
UnsafeLimit = Annotated[
    AboveZero | None,
    Field(
        description="A row's unsafe distance counts up to this multiple of its reference's norm; none = no bound, as "
        "published."
    ),
]
Quirks = Annotated[bool, Field(description="Reproduce slips of the published code (docs/objectives.md).")]
PaddedLength = Annotated[
    Positive | None,
    Field(
        description="With published_quirks: the length that every sequence is counted as; none = the batch's longest."
    ),
]
Auto = Literal["auto"]
DistanceUnit = Annotated[
    Literal["state", "reference"],
    Field(
        description="What distances count in: the states' own length, or the median norm of each hidden state's "
        "reference rows."
    ),
]
