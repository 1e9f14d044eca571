"""What every section of the configuration has in common, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
"""Of whole numbers: what counts, indexes and seeds in other libraries takes 32 bits."""
MOST_STATES = 100_000
"""Hidden states of a window, which is written out; no model comes near."""


def _up_to(most: int) -> AfterValidator:
    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"must be at most {most}")
        return value

    return AfterValidator(check)


Positive = Annotated[int, Field(ge=1), _up_to(LARGEST)]
NonNegative = Annotated[int, Field(ge=0), _up_to(LARGEST)]
StateIndex = Annotated[int, Field(ge=0), _up_to(MOST_STATES)]
StateCount = Annotated[int, Field(ge=1), _up_to(MOST_STATES)]
Weight = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, a value is never converted to another type, assignment is
    validated.
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)
