"""``repbend-fast recipes ls|show|cp``."""

from __future__ import annotations

from argparse import Namespace


def ls(arguments: Namespace) -> int:
    """Prints name and summary of every shipped recipe, then of every overlay and every policy as it is typed."""
    from repbend_fast.config.shipped import overlay_names, policy_names, recipe_names, summary

    typed = {name: name for name in recipe_names()} | {f"--with {name}": name for name in overlay_names()}
    typed |= {f"data make {name}": name for name in policy_names()}
    width = max(map(len, typed))
    for words, name in typed.items():
        print(f"{words:<{width}}  {summary(name)}")
    return 0


def show(arguments: Namespace) -> int:
    """Prints a recipe, an overlay or a policy as it is written."""
    from repbend_fast.config.shipped import recipe_text

    print(recipe_text(arguments.recipe), end="")
    return 0


def cp(arguments: Namespace) -> int:
    """Copies a recipe, an overlay or a policy and prints the new file's path."""
    from repbend_fast.config.shipped import copy_recipe
    from repbend_fast.nearby import own_path

    print(copy_recipe(arguments.recipe, own_path(arguments.target)))
    return 0
