"""What recipes leave to be said, and tests say for them."""

from __future__ import annotations

from repbend_fast.config import recipe_names, recipe_text

NEEDED = {"any": ["model.name=M", "data.sources=mine.jsonl"]} | {
    name: ["data.sources=mine.jsonl"] for name in recipe_names() if "\nbase: any\n" in recipe_text(name)
}
"""Settings by recipe: of one for every model the model and the data, of one for a single model the data."""
