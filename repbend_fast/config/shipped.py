"""The recipes that ship with the package."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import repbend_fast
from repbend_fast.errors import UserError

SUFFIXES = (".yaml", ".yml")


def recipe_folder() -> Path:
    """Installed as ``repbend_fast/recipes``; in the source tree (and so in an editable install) ``recipes`` beside the package."""
    package = Path(repbend_fast.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"{package}: the shipped recipes are missing; reinstall repbend-fast")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(recipe: str, beside: Path | None = None) -> tuple[Path, str]:
    """The file of a recipe and its name in messages.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        beside: Folder against which a relative path is tried first (for ``base``).

    Raises:
        UserError: no such recipe, with the closest name.
    """
    if recipe.endswith(SUFFIXES) or "/" in recipe or "\\" in recipe:
        path = Path(recipe).expanduser()
        if beside is not None and not path.is_absolute() and (beside / path).is_file():
            path = beside / path
        if path.is_dir():
            raise UserError(f"{recipe}: is a folder, expected a recipe's name or a YAML file")
        return path, recipe
    names = recipe_names()
    if recipe in names:
        return recipe_folder() / f"{recipe}.yaml", f"{recipe}.yaml"
    close = difflib.get_close_matches(recipe, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"`repbend-fast recipes ls` lists the {len(names)} that are shipped"
    raise UserError(f"no recipe is called {recipe} (a file's name ends in .yaml); {hint}")


def recipe_text(recipe: str) -> str:
    """The text of a recipe, comments included."""
    path, name = find_recipe(recipe)
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    return path.read_text(encoding="utf-8")


def summary(recipe: str) -> str:
    """The first comment line of a recipe."""
    first = recipe_text(recipe).split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy_recipe(recipe: str, target: Path) -> Path:
    """Copies a recipe to ``target`` (a file, or a folder that exists) and returns the new file.

    Raises:
        UserError: the file exists already, or its folder does not.
    """
    source, name = find_recipe(recipe)
    if not source.is_file():
        raise UserError(f"{name}: no such file")
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or remove it")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    shutil.copyfile(source, target)
    return target
