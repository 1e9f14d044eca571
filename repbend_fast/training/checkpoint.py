"""Resumable checkpoints: adapter, optimizer, schedule, data position, random state and the guard's memory.

Tensors are read back with ``weights_only``; nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repbend_fast.config import Config
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.adapters import ADAPTER
from repbend_fast.models.causal import CausalLM
from repbend_fast.runs.folder import RunFolder, write_folder

FORMAT = 1


@dataclass(kw_only=True)
class SavedState:
    """What of a run's state is JSON: it is read before any model is.

    ``sampler``, ``guard``: their own. ``settings``: those that shape a checkpoint, and what validation was measured on.
    ``limits``: the guard's. ``units``: lengths that count as 1, by hidden state. ``kl_weight``: None without a limit.
    ``first_levers``, ``last_levers``: those of the run's start and those in force; empty in checkpoints before they
    were kept.
    """

    step: int
    sampler: dict[str, object]
    guard: dict[str, object]
    stopped: str | None
    settings: dict[str, object]
    limits: dict[str, Any]
    units: dict[int, float] = field(default_factory=dict)
    kl_weight: float | None = None
    first_levers: dict[str, Any] = field(default_factory=dict)
    last_levers: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The content of ``state.json``."""
        return {
            "format": FORMAT,
            "step": self.step,
            "sampler": self.sampler,
            "guard": self.guard,
            "stopped": self.stopped,
            "settings": self.settings,
            "limits": self.limits,
            "units": {str(layer): unit for layer, unit in self.units.items()},
            "kl_weight": self.kl_weight,
            "levers": {"first": self.first_levers, "last": self.last_levers},
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> SavedState:
        """The state that was written.

        Raises:
            ValueError: something that every checkpoint has is not there.
        """
        needed = {each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING}
        if missing := needed - found.keys():
            raise ValueError(f"state.json has no {', '.join(sorted(missing))}")
        levers = found.get("levers") or {}
        return cls(
            **{name: found[name] for name in needed},
            units={int(layer): unit for layer, unit in found.get("units", {}).items()},
            kl_weight=found.get("kl_weight"),
            first_levers=levers.get("first", {}),
            last_levers=levers.get("last", {}),
        )


@dataclass(kw_only=True)
class TrainingState(SavedState):
    """What a run needs besides the adapter's weights. ``best``: the best adapter's, None where none was best yet."""

    optimizer: dict[str, object]
    scaler: dict[str, object]
    best: dict[str, Tensor] | None

    def tensors(self) -> dict[str, object]:
        """The content of ``state.pt`` besides the adapter and the random state."""
        return {name: getattr(self, name) for name in IN_TENSORS}

    @classmethod
    def of(cls, saved: SavedState, tensors: dict[str, Any]) -> TrainingState:
        """Both parts together."""
        return cls(**vars(saved), **{name: tensors[name] for name in IN_TENSORS})


IN_TENSORS = ("optimizer", "scaler", "best")


def adapter_weights(model: CausalLM) -> dict[str, Tensor]:
    """A copy of the trained adapter on the CPU, by parameter name."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


def load_adapter_weights(model: CausalLM, weights: dict[str, Tensor]) -> None:
    """Put a copy made by ``adapter_weights`` back, in place."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(
            "the checkpoint's adapter has other layers than this run's; resume with the model and settings it was made "
            "with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def save_adapter(model: CausalLM, path: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter in PEFT format (safetensors), atomically; ``weights`` in place of the current ones
    when given.
    """
    current = adapter_weights(model) if weights is not None else None
    if weights is not None:
        load_adapter_weights(model, weights)
    try:
        write_folder(
            path,
            lambda folder: model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False),
        )
    finally:
        if current is not None:
            load_adapter_weights(model, current)


def save_checkpoint(run: RunFolder, state: TrainingState, model: CausalLM, keep: int) -> Path:
    """Write ``checkpoints/step-NNNNNN`` atomically, then drop all but the ``keep`` newest."""
    path = run.checkpoint(state.step)

    def fill(folder: Path) -> None:
        # Through Python's file, a full disk is an OSError; torch's own writer hides the reason.
        with open(folder / "state.pt", "wb") as file:
            torch.save(state.tensors() | {"adapter": adapter_weights(model), "random": random_state()}, file)
        (folder / "state.json").write_text(json.dumps(state.as_json()), encoding="utf-8")

    write_folder(path, fill)
    for old in run.all_checkpoints()[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


YARDSTICK = "validation."
"""How the settings begin that say what the validation before training was measured on."""


BEFORE_A_CHOICE = {"objective.distance_unit": "state", "training.normalize": "micro_batch"}
"""What checkpoints of earlier versions were written with, which do not say it."""


def fixed_settings(config: Config) -> dict[str, object]:
    """Settings that shape what a checkpoint holds, by key: a run cannot go on with others."""
    lora = {f"lora.{key}": value for key, value in config.lora.model_dump(mode="json").items()}
    model = {f"model.{key}": getattr(config.model, key) for key in ("dtype", "quantization", "double_quantization")}
    training = {f"training.{key}": getattr(config.training, key) for key in ("optimizer", "normalize")}
    fixed = lora | model | training | {"objective.name": config.objective.name}
    if hasattr(config.objective, "distance_unit"):
        fixed["objective.distance_unit"] = config.objective.distance_unit
    if config.validation.every:
        # The validation before training, which the others are compared with, was measured on these.
        settings = config.validation.model_dump(
            mode="json", include={"prompts", "max_new_tokens", "sources", "holdout"}
        )
        settings["holdout"] = None if settings["sources"] else settings["holdout"]
        fixed |= {f"{YARDSTICK}{key}": value for key, value in settings.items()}
    return fixed


def read_state(path: Path, config: Config) -> SavedState:
    """The JSON part of a checkpoint, read before any weight is, so that a run that cannot go on says so at once.

    Raises:
        UserError: not a checkpoint, damaged, of another format, or written with other settings.
    """
    with _reading(path):
        plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(
            f"{path}: written by another version of repbend-fast (format {FORMAT} is read); start a new run in another "
            "folder"
        )
    try:
        saved = SavedState.from_json(plain)
    except (ValueError, AttributeError) as error:
        raise UserError(_damaged(path, one_line(error))) from error
    for key, own in fixed_settings(config).items():
        # One of a run without validation has no settings of it.
        written = saved.settings.get(key, BEFORE_A_CHOICE.get(key, own))
        if written != own:
            # Without sources the held-out records would become training data, with which the sampler cannot go on.
            off = key.startswith(YARDSTICK) and config.validation.sources
            remedy = "set it back, or validation.every=0" if off else "set it back"
            raise UserError(f"cannot resume: {key}={own}, but the checkpoint was written with {written}; {remedy}")
    return saved


def load_checkpoint(path: Path, config: Config, model: CausalLM) -> TrainingState:
    """Read a checkpoint, put its adapter into ``model`` and restore the random state.

    Raises:
        UserError: as ``read_state``, or the adapter is of another shape.
    """
    saved = read_state(path, config)
    with _reading(path):
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not {"adapter", "random", *IN_TENSORS} <= tensors.keys():
        raise UserError(_damaged(path, "state.pt is incomplete"))
    load_adapter_weights(model, tensors.pop("adapter"))
    set_random_state(tensors.pop("random"))
    return TrainingState.of(saved, tensors)


def adapter_from_checkpoint(path: Path) -> dict[str, Tensor]:
    """The adapter alone, by parameter name.

    Raises:
        UserError: not a checkpoint, or a damaged one.
    """
    with _reading(path):
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not isinstance(tensors.get("adapter"), dict):
        raise UserError(_damaged(path, "state.pt is incomplete"))
    return tensors["adapter"]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(_damaged(path, f"no {Path(error.filename).name}")) from error
    except PermissionError as error:
        raise UserError(f"{path}: the checkpoint cannot be read ({error.strerror}); make its files readable") from error
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(_damaged(path, one_line(error))) from error


def _damaged(path: Path, why: str) -> str:
    return f"{path}: damaged checkpoint ({why}); remove it to resume from the one before"


def random_state() -> dict[str, Tensor]:
    """torch's random state on the CPU and the current CUDA device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
