"""The recipes that ship with the package, and the overlays: settings that any of them can take on top."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import repbend_fast
from repbend_fast.errors import UserError
from repbend_fast.nearby import own_path

SUFFIXES = (".yaml", ".yml")
OVERLAYS = "overlays"
POLICIES = "policies"


def recipe_folder() -> Path:
    """Installed as ``repbend_fast/recipes``; in the source tree (and so in an editable install) ``recipes`` beside the
    package.
    """
    package = Path(repbend_fast.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"{package}: the shipped recipes are missing; reinstall repbend-fast")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def overlay_names() -> list[str]:
    """Names of the shipped overlays, sorted."""
    return sorted(path.stem for path in (recipe_folder() / OVERLAYS).glob("*.yaml"))


def policy_names() -> list[str]:
    """Names of the shipped policies, sorted."""
    return sorted(path.stem for path in (recipe_folder() / POLICIES).glob("*.yaml"))


def find_policy(policy: str) -> Path:
    """The file of a policy for ``data make``: of a shipped one by its name, else a path, which may not be there.

    Raises:
        UserError: no such policy, with the closest name.
    """
    if found := _file(policy, None):
        return found[0]
    if policy in policy_names():
        return recipe_folder() / POLICIES / f"{policy}.yaml"
    raise _unknown("policy", policy, policy_names())


def find_recipe(recipe: str, beside: Path | None = None) -> tuple[Path, str]:
    """The file of a recipe and its name in messages.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        beside: Folder against which a relative path is tried first (for ``base``).

    Raises:
        UserError: no such recipe, with the closest name; or an overlay's name, with the command that takes it.
    """
    names, overlays = recipe_names(), overlay_names()
    if found := _file(recipe, beside):
        return found
    if recipe in names:
        return recipe_folder() / f"{recipe}.yaml", f"{recipe}.yaml"
    if recipe in overlays:
        raise UserError(f"{recipe} is an overlay, which goes on top of a recipe: write RECIPE --with {recipe}")
    if words := overlay_meant(recipe):
        raise UserError(f"no recipe is called {recipe}; {words}")
    raise _unknown("recipe", recipe, names)


def overlay_meant(name: str) -> str | None:
    """What to write in the place of a recipe's name with an overlay's behind it, as in
    ``llama-3-8b-instruct-qlora``.
    """
    for overlay in overlay_names():
        start = name.removesuffix(f"-{overlay}")
        if start != name and start in recipe_names():
            return f"write {start} --with {overlay} (in a file base: {start} and with: {overlay})"
    return None


def find_overlay(overlay: str, beside: Path | None = None) -> tuple[Path, str]:
    """As :func:`find_recipe`, for what ``--with`` and ``with:`` name: a shipped overlay, or any YAML file.

    Raises:
        UserError: no such overlay, with the closest name; or a recipe's, which would replace what it should go on top
            of.
    """
    names = overlay_names()
    if found := _file(overlay, beside):
        return found
    if overlay in names:
        return recipe_folder() / OVERLAYS / f"{overlay}.yaml", f"{overlay}.yaml"
    if overlay in recipe_names():
        raise UserError(
            f"{overlay} is a recipe, not an overlay, and --with takes overlays: {', '.join(names)}, or a YAML file"
        )
    raise _unknown("overlay", overlay, names)


def _file(name: str, beside: Path | None) -> tuple[Path, str] | None:
    """The path that ``name`` is, if it is one rather than a shipped name."""
    if not (name.endswith(SUFFIXES) or "/" in name or "\\" in name):
        return None
    path = own_path(name)
    if beside is not None and not path.is_absolute() and (beside / path).is_file():
        path = beside / path
    if path.is_dir():
        raise UserError(f"{name}: is a folder, expected a recipe's name or a YAML file")
    return path, name


def _unknown(kind: str, name: str, names: list[str]) -> UserError:
    close = difflib.get_close_matches(name, names, n=1)
    hint = (
        f"did you mean {close[0]}?" if close else f"`repbend-fast recipes ls` lists the {len(names)} that are shipped"
    )
    return UserError(f"no {kind} is called {name} (a file's name ends in .yaml); {hint}")


def bare_name(recipe: str) -> str:
    """What a recipe or an overlay is called without folder and ending: ``mine`` for ``~/recipes/mine.yaml``."""
    name = Path(recipe).name
    return Path(name).stem if name.endswith(SUFFIXES) else name


def recipe_text(recipe: str) -> str:
    """The text of a recipe, an overlay or a policy, comments included."""
    path, name = _any_shipped(recipe)
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    return path.read_text(encoding="utf-8")


def summary(recipe: str) -> str:
    """The first comment line of a recipe, an overlay or a policy."""
    first = recipe_text(recipe).split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy_recipe(recipe: str, target: Path) -> Path:
    """Copies a recipe, an overlay or a policy to ``target`` (a file, or a folder that exists) and returns the new file.

    Raises:
        UserError: the file exists already, or its folder does not.
    """
    source, name = _any_shipped(recipe)
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


def _any_shipped(name: str) -> tuple[Path, str]:
    if name in policy_names():
        return find_policy(name), f"{name}.yaml"
    return find_overlay(name) if name in overlay_names() else find_recipe(name)
