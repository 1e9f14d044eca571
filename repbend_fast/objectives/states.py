"""Checks of settings against a model's depth."""

from __future__ import annotations

from collections.abc import Iterable

from repbend_fast.errors import UserError


def check_states(setting: str, states: Iterable[int], num_blocks: int) -> None:
    """Refuse hidden states that a model with ``num_blocks`` blocks does not have.

    Raises:
        UserError: naming the setting, its value and the states that there are.
    """
    wanted = list(states)
    if max(wanted) > num_blocks:
        shown = wanted[0] if len(wanted) == 1 else wanted
        raise UserError(f"{setting}={shown}: this model has hidden states 0 … {num_blocks}")
