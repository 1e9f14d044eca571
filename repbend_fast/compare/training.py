"""One training of a comparison: a run folder that is made, gone on with, or found finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from repbend_fast.compare import process
from repbend_fast.compare.comparison import Method
from repbend_fast.config import Config, load_config, resolved_yaml
from repbend_fast.errors import UserError
from repbend_fast.report.run_record import RunRecord, read_run
from repbend_fast.runs.folder import RunFolder, write_json, write_text

State = Literal["finished", "diverged", "half", "none"]


@dataclass(frozen=True)
class Training:
    """A method with one learning rate and one seed. ``folder`` is the run's; its configuration files and its log lie
    beside it.
    """

    method: Method
    learning_rate: float
    seed: int
    folder: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def title(self) -> str:
        return f"{self.method.name}, learning rate {self.learning_rate:g}, seed {self.seed}"

    def config(self, test: bool) -> Config:
        """The run's configuration; with ``test`` it evaluates on the test prompts, without it does not read them."""
        config = self.method.config.model_copy(deep=True)
        config.training.learning_rate = self.learning_rate
        config.training.seed = self.seed
        config.training.log_every = 1  # the seconds of every step are wanted
        config.output.folder = str(self.folder)
        if not test:
            config.evaluation.prompts = None
            config.evaluation.sources = []
            config.output.report = False
        return config


def training_of(folder: Path, method: Method, learning_rate: float, seed: int) -> Training:
    """The training whose run folder is ``FOLDER/RECIPE/seed-N/lr-1e-03``."""
    return Training(
        method, learning_rate, seed, folder / method.slug / f"seed-{seed}" / f"lr-{rate_text(learning_rate)}"
    )


def rate_text(rate: float) -> str:
    """``1e-03``, ``2.2e-03``: as short as it can be, and of one width for sorting."""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def state(training: Training) -> State:
    """What is in the run's folder. A run with other settings counts as none: training moves it aside."""
    if not _same_settings(training):
        return "none"
    events = {row.get("event") for row in read_run(training.folder).events}
    if "finished" in events:
        return "finished"
    if "not_finite" in events:
        return "diverged"
    return "half" if training.run.latest_checkpoint() is not None else "none"


def _same_settings(training: Training) -> bool:
    """The run's own config.yaml is the mark: it is written when the training starts, and into no other folder."""
    if not training.run.config.is_file():
        return False
    try:
        found = load_config(str(training.run.config))
    except UserError:
        return False
    wanted = training.config(test=False)
    return _trained(found, wanted) == _trained(wanted, wanted)


def _trained(config: Config, wanted: Config) -> dict[str, object]:
    """What ``config`` trains, in the words of ``wanted``: a run's own file names the layers that ``auto`` stood for."""
    found = config.model_dump(exclude={"evaluation": True, "output": True})
    if wanted.lora.target_modules == "auto":
        found["lora"]["target_modules"] = "auto"
    return found


def train(training: Training) -> RunRecord:
    """The finished run, trained as far as it is not there yet. It may have diverged: ``state`` says so.

    Raises:
        UserError: the run failed for another reason.
        KeyboardInterrupt: Ctrl-C; the run's checkpoint stays.
    """
    found = state(training)
    if found in ("half", "none"):
        file = training.folder.with_name(f"{training.folder.name}.yaml")
        write_text(file, resolved_yaml(training.config(test=False)))
        resume = ["--resume", str(training.folder)] if found == "half" else []
        code = process.run_command(["train", str(file), *resume], training.log)
        if code and state(training) != "diverged":
            raise failure(f"{training.title}: training failed", code, training.log)
    return read_run(training.folder)


def failure(what: str, code: int, log: Path) -> UserError:
    """The one line about a process that failed: what it was, its own last line, and where to read more."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = f" ({lines[-1].strip()[:200]})" if lines else ""
    return UserError(
        f"{what} with exit code {code}{said}; see {log}, mend it and give the same command again: finished runs are "
        "kept"
    )


def measure_before(method: Method, folder: Path) -> dict[str, object]:
    """The test evaluation of the untrained model, which is the same for all methods. Measured once.

    Raises:
        UserError: the evaluation failed.
    """
    result, file = folder / "before.json", folder / "before.yaml"
    text = resolved_yaml(method.config)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        result.unlink(missing_ok=True)
        write_text(file, text)
    if not result.is_file():
        log = folder / "before.log"
        code = process.run_command(["eval", str(file), "--out", str(result)], log)
        if code:
            raise failure("the model before training: its evaluation failed", code, log)
    return dict(json.loads(result.read_text(encoding="utf-8"))["before"])


def evaluate(training: Training, before: dict[str, object]) -> RunRecord:
    """The finished run with the test evaluation of its kept adapter, measured as far as it is not there yet.

    Resuming a finished run with evaluation switched on trains nothing and does the rest: evaluation and report.

    Raises:
        UserError: the evaluation failed.
    """
    config = training.config(test=True)
    record = read_run(training.folder)
    as_wanted = load_config(str(training.run.config)).evaluation == config.evaluation
    if not (as_wanted and record.after and record.before == before):
        # An earlier `after` must not be taken for this one, should the evaluation be interrupted.
        write_json(training.run.evaluation, {"before": before})
        write_text(training.run.config, resolved_yaml(config))  # the settings that this `before` was measured with
        file = training.folder.with_name(f"{training.folder.name}.test.yaml")
        write_text(file, resolved_yaml(config))
        code = process.run_command(["train", str(file), "--resume", str(training.folder)], training.log)
        if code:
            raise failure(f"{training.title}: evaluation failed", code, training.log)
    return read_run(training.folder)
