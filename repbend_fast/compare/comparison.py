"""What is compared: the recipes, and the proof that they differ in nothing but the method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from repbend_fast.config import Config, check_files, load_config
from repbend_fast.config.messages import show
from repbend_fast.data.prompts import load_prompts
from repbend_fast.errors import UserError

DEFAULT_RECIPES = ("demo", "demo-circuit-breaker", "demo-rmu", "demo-npo", "demo-crl")
DEFAULT_RATES = (5e-4, 1e-3, 2e-3)
DEFAULT_SEEDS = (0,)
DEFAULT_FOLDER = Path("runs/compare")
# A method's own choice, and settings that change neither the result nor its cost. Examples and accumulation are
# compared as a product.
FREE_SECTIONS = frozenset({"objective", "output"})
FREE = frozenset(
    {
        "lora.target_modules",
        "lora.blocks",
        "training.learning_rate",
        "training.schedule",
        "training.decay_steps",
        "training.seed",
        "training.examples",
        "training.accumulation",
    }
    | {f"training.{key}" for key in ("checkpoint_every", "keep_checkpoints", "log_every")}
)
# Settings that the command itself gives to each run, with the option that they come from.
OWN = {"training.learning_rate": "--rates or --recipe-rates", "training.seed": "--seeds", "output.folder": "--out"}


@dataclass(frozen=True)
class Method:
    """One recipe of a comparison. ``name`` is the objective's, or the recipe's where two recipes share an objective."""

    name: str
    recipe: str
    config: Config

    @property
    def slug(self) -> str:
        """The name of the recipe's folder in the comparison's."""
        return Path(self.recipe).stem if self.recipe.endswith((".yaml", ".yml")) else self.recipe


@dataclass(frozen=True)
class Comparison:
    """``rates`` are tried with the first of ``seeds``; the others train with the chosen one. Everything lies in
    ``folder``.

    ``recipe_rates``: each method tries its own recipe's rate too. ``jobs``: processes at once, which share the CPU's
    cores.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    folder: Path
    overrides: tuple[str, ...] = ()
    overlays: tuple[str, ...] = ()
    jobs: int = 1
    recipe_rates: bool = False

    def rates_of(self, method: Method) -> tuple[float, ...]:
        """What ``method`` tries."""
        own = (method.config.training.learning_rate,) if self.recipe_rates else ()
        return tuple(dict.fromkeys((*own, *self.rates)))


def load_comparison(
    recipes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    overlays: Sequence[str] = (),
    seeds: Sequence[int] = DEFAULT_SEEDS,
    rates: Sequence[float] | None = None,
    recipe_rates: bool = False,
    folder: Path = DEFAULT_FOLDER,
    jobs: int = 1,
) -> Comparison:
    """Load the recipes, the same ``overlays`` and ``overrides`` on each, and refuse what could not be compared.

    Trains nothing, loads no weights. Without ``rates``: ``DEFAULT_RATES``, or the recipes' own alone with
    ``recipe_rates``.

    Raises:
        UserError: a recipe that does not load or names files that are missing, settings that differ, or no validation
            or evaluation.
    """
    if rates is None:
        rates = () if recipe_rates else DEFAULT_RATES
    if bad := [rate for rate in rates if not 0 < rate < float("inf")]:
        raise UserError(f"--rates {bad[0]:g}: must be above 0")
    if bad := [seed for seed in seeds if seed < 0]:
        raise UserError(f"--seeds {bad[0]}: must be 0 or more")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be 1 or more")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    configs = [load_config(recipe, overrides, overlays=overlays) for recipe in recipes]
    for recipe, config in zip(recipes, configs, strict=True):
        _check_own(recipe, config, overlays)
        _check_measured(recipe, config)
        check_files(config)
    objectives = [config.objective.name for config in configs]
    methods = []
    for recipe, config, objective in zip(recipes, configs, objectives, strict=True):
        name = objective if objectives.count(objective) == 1 else Method("", recipe, config).slug
        methods.append(Method(name, recipe, config))
    check_equal(methods)
    # Asked here, and forgotten: a broken file of test prompts should not come up after an hour of training.
    load_prompts(methods[0].config.evaluation.prompts)  # type: ignore[arg-type]
    seeds, rates = tuple(dict.fromkeys(seeds)), tuple(dict.fromkeys(rates))
    return Comparison(tuple(methods), seeds, rates, folder, tuple(overrides), tuple(overlays), jobs, recipe_rates)


def check_equal(methods: Sequence[Method]) -> None:
    """Refuse methods that differ in more than objective, adapted layers, learning rate and its schedule.

    Raises:
        UserError: the first setting that differs, with both recipes and values; or two recipes of one name.
    """
    slugs = [method.slug for method in methods]
    if twice := next((slug for slug in slugs if slugs.count(slug) > 1), None):
        raise UserError(f"{twice}: two recipes of this name; each has a folder of its own, so copy one to another name")
    first, *others = methods
    own = dict(_compared(first.config))
    for other in others:
        for key, value in _compared(other.config):
            if own[key] != value:
                raise UserError(
                    f"{first.recipe} and {other.recipe} differ in {key}: {show(own[key])} and {show(value)}; methods "
                    "are compared with "
                    f"equal settings, so give one for all of them, such as {_override(key, own[key], first.config)}"
                )


def _compared(config: Config) -> Iterator[tuple[str, object]]:
    training = config.training
    yield "training.examples × training.accumulation", training.examples * training.accumulation
    for section, values in config.model_dump(mode="json").items():
        if section not in FREE_SECTIONS:
            yield from ((f"{section}.{key}", value) for key, value in values.items() if f"{section}.{key}" not in FREE)


def _override(key: str, value: object, config: Config) -> str:
    if "×" in key:
        return f"training.examples={config.training.examples} training.accumulation={config.training.accumulation}"
    return f"{key}=…" if isinstance(value, dict | list) else f"{key}={show(value)}"


def _check_own(recipe: str, config: Config, overlays: Sequence[str]) -> None:
    try:
        plain = load_config(recipe, overlays=overlays, note=lambda _: None)
    except UserError:
        return  # only the overrides make it whole, so there is nothing to tell them from
    for key, option in OWN.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value != getattr(getattr(plain, section), name):
            raise UserError(
                f"{key}={show(value)}: here it comes from {option}, which gives each method the same; use that instead"
            )


def _check_measured(recipe: str, config: Config) -> None:
    if not config.validation.every:
        raise UserError(
            f"{recipe}: validation.every=0, but learning rates are chosen by validation; set validation.every=20 or "
            "the like"
        )
    if config.validation.every > config.training.steps:
        every, steps = config.validation.every, config.training.steps
        raise UserError(f"{recipe}: validation.every={every} is more than training.steps={steps}; lower it")
    if config.evaluation.prompts is None:
        raise UserError(
            f"{recipe}: evaluation.prompts=null, but methods are compared on test prompts; set evaluation.prompts.path"
        )
