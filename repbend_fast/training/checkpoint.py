"""Resumable checkpoints: adapter, optimizer, schedule, data position, random state and the guard's memory.

A checkpoint is the adapter in PEFT format, ``state.safetensors``, ``state.json`` and, written last, ``manifest.json``
with size and SHA-256 of each. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repbend_fast.config import Config
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.adapters import ADAPTER
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import CausalLM
from repbend_fast.runs.folder import RunFolder, write_folder
from repbend_fast.runs.stored import (
    Damaged,
    Stored,
    apart,
    checked_manifest,
    read_plain,
    together,
    write_manifest,
    write_plain,
    write_tensors,
)
from repbend_fast.step.dropout_keys import MASKS

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
        for name in ("sampler", "guard", "settings", "limits"):
            if not isinstance(found[name], dict):
                raise ValueError(f"{name} in state.json is no object")
        if not isinstance(found["step"], int) or not isinstance(found["stopped"], str | None):
            raise ValueError("state.json has no step, or stopped for no reason")
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
        """What ``state.safetensors`` holds besides the random state."""
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
        write_folder(path, lambda folder: _write_adapter(model, folder))
    finally:
        if current is not None:
            load_adapter_weights(model, current)


def _write_adapter(model: CausalLM, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)


def _write_state(state: TrainingState, folder: Path) -> dict[str, Stored]:
    tensors: dict[str, Tensor] = {}
    values = {name: apart(each, tensors, name) for name, each in (state.tensors() | {"random": random_state()}).items()}
    return {
        "state.safetensors": write_tensors(folder / "state.safetensors", tensors),
        "state.json": write_plain(folder / "state.json", state.as_json() | {"values": values}),
    }


def save_checkpoint(run: RunFolder, state: TrainingState, model: CausalLM, keep: int, made: dict[str, object]) -> Path:
    """Write ``checkpoints/step-NNNNNN`` atomically, then drop the oldest of more than ``keep``, never the one just
    written. ``made``: ``made_on`` of the run. Of several processes one alone writes.
    """
    path = run.checkpoint(state.step)

    def fill(folder: Path) -> None:
        _write_adapter(model, folder)
        known = _write_state(state, folder)
        write_manifest(folder, known, made)

    write_folder(path, fill)
    others = [other for other in run.all_checkpoints() if other != path]
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return path


YARDSTICK = "validation."
"""How the settings begin that say what the validation before training was measured on."""


BEFORE_A_CHOICE = {"objective.distance_unit": "state", "training.normalize": "micro_batch"}
"""What checkpoints of earlier versions were written with, which do not say it."""


def fixed_settings(config: Config) -> dict[str, object]:
    """Settings that shape what a checkpoint holds, by key: a run cannot go on with others."""
    lora = {f"lora.{key}": value for key, value in config.lora.model_dump(mode="json").items()}
    model = {f"model.{key}": getattr(config.model, key) for key in ("quantization", "double_quantization")}
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
        plain = read_plain(path / "state.json")
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(
            f"{path}: written by another version of repbend-fast (format {FORMAT} is read); start a new run in another "
            "folder"
        )
    try:
        saved = SavedState.from_json(plain)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(_damaged(path, one_line(error))) from error
    for key, own in fixed_settings(config).items():
        # One of a run without validation has no settings of it.
        written = saved.settings.get(key, BEFORE_A_CHOICE.get(key, own))
        # The loaded model says what auto stands for; it is asked then.
        if written != own and (key, own) != ("lora.target_modules", "auto"):
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
        tensors = load_file(path / "state.safetensors")
        values = {name: together(each, tensors) for name, each in read_plain(path / "state.json")["values"].items()}
    if not {"random", *IN_TENSORS} <= values.keys():
        raise UserError(_damaged(path, "state.json is incomplete"))
    load_adapter_weights(model, _adapter_in(path, model))
    with _reading(path):
        set_random_state(values.pop("random"))
    return TrainingState.of(saved, values)


def check_intact(path: Path) -> None:
    """Say at once what would stop a checkpoint from being read: it takes no model.

    Raises:
        UserError: not a checkpoint, a damaged one, or one of another version.
    """
    with _reading(path):
        checked_manifest(path)


def load_checkpoint_adapter(path: Path, model: CausalLM) -> None:
    """Put the adapter alone into ``model``.

    Raises:
        UserError: not a checkpoint, a damaged one, or the adapter is of another shape.
    """
    check_intact(path)
    load_adapter_weights(model, _adapter_in(path, model))


def _adapter_in(path: Path, model: CausalLM) -> dict[str, Tensor]:
    """By parameter name; PEFT leaves the adapter's own name out of its files."""
    with _reading(path):
        found = load_file(path / "adapter_model.safetensors")
    names = {name.replace(f".{ADAPTER}", ""): name for name, p in model.named_parameters() if p.requires_grad}
    return {names.get(name, name): weight for name, weight in found.items()}


def intact_checkpoint(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and a note for each newer one that is not.

    Raises:
        UserError: there are checkpoints and none is intact, or the newest is of another version.
    """
    damage: list[tuple[Path, Damaged]] = []
    for path in reversed(run.all_checkpoints()):
        try:
            checked_manifest(path)
        except Damaged as error:
            damage.append((path, error))
        else:
            return path, [f"note: {bad} is damaged ({why}); the one before it is used" for bad, why in damage]
    if damage:
        found = "; ".join(f"{bad.name}: {why}" for bad, why in damage)
        raise UserError(
            f"{run.checkpoints}: no checkpoint is intact ({found}); train again without --resume, which keeps this "
            "folder under another name"
        )
    return None, []


def set_aside_newer(run: RunFolder, checkpoint: Path) -> None:
    """Rename the damaged checkpoints after the one that the run goes on from, so that none counts as the newest."""
    found = run.all_checkpoints()
    for path in found[found.index(checkpoint) + 1 :]:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def made_on(config: Config, device: torch.device, processes: int = 1) -> dict[str, object]:
    """What a run's numbers depend on and what it may change when it goes on: the machine, and what that has to compute
    in.
    """
    dtype = autocast_dtype(config, device)
    return {
        "device": device.type,
        "dtype": config.model.dtype if dtype is None else str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "torch": torch.__version__,
        "masks": MASKS,
    }


def moved_notes(path: Path, here: dict[str, object], dropout: float) -> list[str]:
    """Where a checkpoint comes from, if not from ``here`` (``made_on``), and whether the rest of the run draws other
    dropout masks.
    """
    found = checked_manifest(path).get("made_on")
    before = found if isinstance(found, dict) else {}
    notes = []
    if dropout and before.get("masks", 1) != here["masks"]:
        notes.append(
            f"note: the checkpoint is of another version of repbend-fast, in which lora.dropout={dropout:g} drew other "
            "masks; the run goes on with this version's, and its numbers differ from those that it would have had"
        )
    changed = [
        f"{key} {before[key]} there, {now} here"
        for key, now in here.items()
        if key != "masks" and before.get(key, now) != now
    ]
    if changed:
        there = "; ".join(changed)
        notes.append(f"note: the checkpoint is from elsewhere ({there}); the run goes on, and may differ by rounding")
    return notes


_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What reading files that are not as they were written may raise; RecursionError is a RuntimeError."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # safetensors names the file in its text alone.
        name = Path(error.filename or str(error).rpartition(": ")[2]).name
        raise UserError(_damaged(path, f"no {name}")) from error
    except PermissionError as error:
        raise UserError(f"{path}: the checkpoint cannot be read ({error.strerror}); make its files readable") from error
    except (*_UNREADABLE, Damaged) as error:
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
