"""What ``metrics.jsonl`` gets, shown in TensorBoard, Weights & Biases or trackio too, if ``output.report_to`` says so.

A tracker never stops a run: one that fails is left out from then on, with a note. None needs a network: without a key
Weights & Biases keeps its files for ``wandb sync``, and the other two are local.
"""

from __future__ import annotations

import importlib
import json
import math
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol, cast

from repbend_fast.config import Config
from repbend_fast.config.schema import ModelConfig, TrackerName
from repbend_fast.console import note
from repbend_fast.errors import UserError, one_line
from repbend_fast.nearby import own_path
from repbend_fast.runs.folder import RunFolder, write_json
from repbend_fast.runs.metrics import MetricsLog

PROJECT = "repbend-fast"
_MODULES: dict[TrackerName, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
_SECTIONS = {"step": "train", "validation": "validation"}


class Tracker(Protocol):
    """One place that numbers go to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the numbers of a step."""

    def close(self) -> None:
        """Have everything written."""


class _Writer(Protocol):
    """TensorBoard's."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _Module(Protocol):
    """What ``wandb`` and ``trackio`` have in common."""

    def init(self, **settings: object) -> object: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _TensorBoard:
    def __init__(self, config: Config, run: RunFolder, last_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run showed beyond its checkpoint is taken back.
        purge = None if last_step is None else last_step + 1
        self.writer = cast(_Writer, SummaryWriter(str(run.path / "tensorboard"), purge_step=purge))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Logged:
    """Weights & Biases, or trackio, which is called like it."""

    def __init__(self, module: _Module, settings: Mapping[str, object]) -> None:
        self.module = module
        module.init(project=PROJECT, resume="allow", **settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def _wandb(config: Config, run: RunFolder, last_step: int | None) -> Tracker:
    settings: dict[str, object] = {"dir": str(run.path), "id": _identity(run, last_step), **_shown(config, run)}
    if "WANDB_MODE" not in os.environ and not _has_key():
        settings["mode"] = "offline"
    return _Logged(cast(_Module, importlib.import_module("wandb")), settings)


def _trackio(config: Config, run: RunFolder, last_step: int | None) -> Tracker:
    name = f"{run.path.name}-{_identity(run, last_step)[:6]}"
    settings = _shown(config, run) | {"name": name}
    return _Logged(cast(_Module, importlib.import_module("trackio")), settings)


_MAKERS: dict[TrackerName, Callable[[Config, RunFolder, int | None], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _shown(config: Config, run: RunFolder) -> dict[str, object]:
    """The run's name and its settings, without the folders of this machine."""
    local = own_path(config.model.name).exists()
    plain = config.model_dump(mode="json", include={"lora", "objective", "training", "memory", "model"})
    hidden = {"adapter", "chat_template"} | ({"name"} if local else set())
    model = {key: plain["model"][key] for key in ModelConfig.model_fields if key not in hidden}
    return {"name": run.path.name, "config": plain | {"model": model}}


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _identity(run: RunFolder, last_step: int | None) -> str:
    """By which a resumed run goes on in the same curve; a new one for a new run in the folder."""
    path = run.path / "tracking.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["id"] if last_step is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if isinstance(known, str) and known:
        return known
    made = uuid.uuid4().hex[:12]
    write_json(path, {"id": made})
    return made


def check_trackers(config: Config) -> None:
    """Raises ``UserError`` for a tracker whose library is not installed."""
    for name in config.output.report_to:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(
                f"output.report_to: {name} is not installed ({one_line(error)}); pip install 'repbend-fast[{name}]', "
                "or leave it out"
            ) from error


class TrackedLog(MetricsLog):
    """The run's log, whose numbers go to trackers too."""

    def __init__(self, config: Config, run: RunFolder, last_step: int | None = None) -> None:
        super().__init__(run.metrics, last_step)
        self._trackers: dict[TrackerName, Tracker] = {}
        for name in dict.fromkeys(config.output.report_to):
            self._guarded(name, partial(self._start, name, config, run, last_step))

    def write(self, kind: str, step: int, **values: object) -> None:
        """As the log; numbers of steps and validations are shown, under ``train/`` and ``validation/``."""
        super().write(kind, step, **values)
        if kind in _SECTIONS and self._trackers:
            shown = dict(_numbers(_SECTIONS[kind], values))
            for name, tracker in list(self._trackers.items()):
                self._guarded(name, partial(tracker.log, shown, step))

    def close(self) -> None:
        """Have the trackers write what they hold."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)
        self._trackers.clear()

    def _start(self, name: TrackerName, config: Config, run: RunFolder, last_step: int | None) -> None:
        self._trackers[name] = _MAKERS[name](config, run, last_step)

    def _guarded(self, name: TrackerName, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever a tracker's library raises, the run goes on
            self._trackers.pop(name, None)
            note(f"output.report_to: {name} failed and is left out ({one_line(error)}); metrics.jsonl has everything")


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}", inner)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield name, float(value)
