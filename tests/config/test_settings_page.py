"""The page of settings says what the settings are, of every key, and was made from the present ones."""

from __future__ import annotations

from pathlib import Path

from repbend_fast.config.keys import all_keys
from repbend_fast.config.settings_page import settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_was_made_from_the_present_settings() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_every_key_is_on_it_with_values_default_and_meaning() -> None:
    lines = [line for line in settings_page().splitlines() if line.startswith("- `")]
    named = {line.split("`")[1] for line in lines}
    sections = {key.rpartition(".")[0] for key in all_keys()}
    assert {key for key in all_keys() if key != "objective.name"} - sections <= named
    assert [line for line in lines if not line.partition("): ")[2]] == []


def test_types_bounds_and_defaults_are_those_of_the_settings() -> None:
    lines = settings_page().splitlines()
    assert "- `lora.dropout` (number ≥ 0 and < 1; default `0.05`): Of the adapter's input, while training." in lines
    assert any(line.startswith("- `model.name` (text; required): ") for line in lines)
    assert any(line.startswith("- `objective.layer` (whole number ≥ 1, or `auto`; default `8`): ") for line in lines)
    assert any(line.startswith("- `data.chat_template_kwargs` (mapping; default empty): ") for line in lines)
