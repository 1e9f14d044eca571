"""``repbend-fast recipes ls|show|cp``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path


def ls(arguments: Namespace) -> int:
    """Prints name and summary of every shipped recipe."""
    from repbend_fast.config.shipped import recipe_names, summary

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {summary(name)}")
    return 0


def show(arguments: Namespace) -> int:
    """Prints a recipe as it is written."""
    from repbend_fast.config.shipped import recipe_text

    print(recipe_text(arguments.recipe), end="")
    return 0


def cp(arguments: Namespace) -> int:
    """Copies a recipe and prints the new file's path."""
    from repbend_fast.config.shipped import copy_recipe

    print(copy_recipe(arguments.recipe, Path(arguments.target).expanduser()))
    return 0
