"""What is asked: a model as it is, or base and bent, where a run, a checkpoint or an adapter makes the difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from repbend_fast.config import Config, load_config
from repbend_fast.config.overrides import Overlays, Overrides, parse_overrides
from repbend_fast.config.shipped import SUFFIXES, recipe_names
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError, one_line
from repbend_fast.evaluation.generate import end_tokens
from repbend_fast.models import attach_lora, find_decoder, load_model, load_tokenizer, resolve_device
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model
from repbend_fast.models.load import base_revision, model_parts
from repbend_fast.models.merge import put_adapter
from repbend_fast.nearby import gguf_files, holds_model, names_model, nearest, own_path, package_folder
from repbend_fast.objectives import build_objective
from repbend_fast.runs.folder import RunFolder
from repbend_fast.runs.token_ids import check_special_tokens
from repbend_fast.training.checkpoint import check_intact, load_checkpoint_adapter

MOST_PROMPT_TOKENS = 4096
LEAST_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Subject:
    """A model that can be loaded, and what bends it.

    ``name``: what the user called it. ``adapter``: the folder or hub name of what makes the bent side; None where
    there is one side. ``bend`` puts it on the loaded base. ``home``: the folder where results belong by default.
    """

    name: str
    config: Config
    home: Path
    adapter: str | None = None
    bend: Callable[[CausalLM], CausalLM] | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Those that are asked: base, and bent where there is an adapter."""
        return ("base",) if self.bend is None else ("base", "bent")


def find_subject(
    target: str, adapter: str | None = None, overrides: Overrides = (), *, overlays: Overlays = ()
) -> Subject:
    """What ``target`` names; no weights are read.

    Args:
        target: the folder of a run or one of its checkpoints, a folder with a model or an adapter, a GGUF file, a hub
            name, ``package:NAME``, or a recipe, whose model is meant.
        adapter: a PEFT adapter on top, in place of the run's own.
        overrides, overlays: settings as :func:`repbend_fast.load_config` takes them; ``model``, ``data`` and ``memory``
            count.

    Raises:
        UserError: nothing of that kind is there.
    """
    path = own_path(target)
    if path.is_dir() and (path / "config.yaml").is_file():
        return _of_run(path, adapter, overrides, overlays)
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "state.pt")):
        return _of_checkpoint(path, adapter, overrides, overlays)
    if target in recipe_names() or target.endswith(SUFFIXES):
        config = load_config(target, overrides, overlays=overlays)
        name = target
    else:
        config = load_config(
            "demo", _with_model(_model_settings(target, path, overrides), overrides), overlays=overlays
        )
        name = target
    if adapter is None:
        config, adapter = _adapter_apart(config)
    if adapter is None:
        return Subject(name, config, _home(target))
    return Subject(name, config, _home(target), adapter, _putting(adapter))


def _of_run(path: Path, adapter: str | None, overrides: Overrides, overlays: Overlays) -> Subject:
    run = RunFolder(path)
    config = load_config(str(run.config), overrides, overlays=overlays)
    if adapter is None and not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{path}: no adapter yet; resume the run with repbend-fast train --resume {path}")
    adapter = adapter or str(run.adapter)
    return Subject(str(path), config, path / "eval", adapter, _putting(adapter))


def _of_checkpoint(path: Path, adapter: str | None, overrides: Overrides, overlays: Overlays) -> Subject:
    run = RunFolder(path.resolve().parent.parent)
    if not run.config.is_file():
        raise UserError(f"{path}: a checkpoint without its run, {run.config} is not there; name one in a run's folder")
    if adapter is not None:
        raise UserError(f"{path}: a checkpoint brings an adapter of its own; name the run or its model with --adapter")
    config = load_config(str(run.config), overrides, overlays=overlays)
    check_intact(path)  # before the base is asked, which takes minutes

    def bend(model: CausalLM) -> CausalLM:
        objective = build_objective(config.objective, find_decoder(model).num_blocks, config.training.steps)
        bent = attach_lora(model, config.lora, (objective.last_state,))
        load_checkpoint_adapter(path, bent)
        return bent.requires_grad_(False).eval()

    return Subject(str(path), config, run.path / f"eval-{path.name}", str(path), bend)


def _putting(adapter: str) -> Callable[[CausalLM], CausalLM]:
    return lambda model: put_adapter(model, adapter, "--adapter")


def _model_settings(target: str, path: Path, overrides: Overrides) -> dict[str, object]:
    """Settings that name the model, on any valid recipe. The dtype is the device's: float32 on a CPU, else bfloat16."""
    name, file = target, None
    given = {override.name.rpartition(".")[2]: override.value for override in parse_overrides(overrides)}
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{target}: no such file{nearest(target)}")
        name, file = str(path.parent), path.name
    elif path.is_dir() and not holds_model(path):
        raise UserError(
            f"{target}: neither a run nor a model, it holds no config.yaml, config.json, adapter or GGUF file"
        )
    elif not path.is_dir() and not names_model(target):
        raise UserError(
            f"{target}: no run, model, recipe or hub name; give a folder, a GGUF file or owner/name{nearest(target)}"
        )
    folder = package_folder(target.removeprefix("package:")) if target.startswith("package:") else path
    if file is None and "gguf_file" not in given and folder is not None and folder.is_dir():
        found = gguf_files(folder)
        if len(found) > 1:
            raise UserError(f"{target}: holds {', '.join(found)}; choose one with model.gguf_file=NAME")
        file = found[0] if found else None
    device = resolve_device(str(given.get("device", "auto")))
    settings: dict[str, object] = {
        "model.name": name,
        "model.gguf_file": file,
        "model.dtype": "float32" if device.type == "cpu" else "bfloat16",
        "data.max_answer_tokens": 512,
    }
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] not in given}


def _with_model(model: dict[str, object], overrides: Overrides) -> Overrides:
    """The user's settings on top of those that name the model."""
    if isinstance(overrides, Mapping):
        return {**model, **overrides}
    words = [f"{key}={'null' if value is None else value}" for key, value in model.items()]
    return [*words, *([overrides] if isinstance(overrides, str) else overrides)]


def _adapter_apart(config: Config) -> tuple[Config, str | None]:
    """A model that is an adapter alone is two sides: its base, and the adapter on it."""
    source, adapters = model_parts(config.model)
    if config.model.adapter or len(adapters) != 1 or adapters[0][0] == source:
        return config, None
    base = config.model.model_copy(update={"name": source, "revision": base_revision(config.model)})
    return config.model_copy(update={"model": base}), adapters[0][0]


def _home(target: str) -> Path:
    """``runs/eval/NAME``: a folder's last part or a hub name, without what a folder's name cannot hold."""
    path = own_path(target)
    name = path.resolve().name if path.exists() else target
    return Path("runs") / "eval" / ("".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:80] or "model")


def load_base(subject: Subject) -> tuple[CausalLM, ChatEncoder]:
    """The base on its device, frozen, and its encoder.

    Raises:
        UserError: the model or its tokenizer cannot be loaded, or do not belong together.
    """
    config = subject.config
    encoder = encoder_of(subject)
    model = load_model(config.model)
    rows = causal_model(model).get_input_embeddings().weight.shape[0]
    check_special_tokens(encoder.tokenizer, rows)
    encoder.vocabulary = rows
    encoder.check_template()
    return model, encoder


def limit_prompts(model: CausalLM, encoder: ChatEncoder, answer_tokens: int) -> None:
    """Prompts of up to 4096 tokens, or as many as the model's positions leave beside an answer."""
    positions = positions_of(model)
    left = positions - answer_tokens if positions else MOST_PROMPT_TOKENS
    encoder.max_prompt_tokens = max(LEAST_PROMPT_TOKENS, min(MOST_PROMPT_TOKENS, left))


def positions_of(model: CausalLM) -> int | None:
    """How many tokens the model's configuration allows for; None where it does not say."""
    positions: int | None = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
    return positions


def encoder_of(subject: Subject) -> ChatEncoder:
    """The encoder with the template's settings of the run, so that answers are asked for as they were trained."""
    data = subject.config.data
    tokenizer = load_tokenizer(subject.config.model)
    return ChatEncoder(tokenizer, MOST_PROMPT_TOKENS, data.max_answer_tokens, data.chat_template_kwargs)


def tokenizer_record(model: CausalLM, encoder: ChatEncoder) -> dict[str, object]:
    """What shows whether two evaluations asked in the same way: hashes of vocabulary and template, and the stop ids."""
    tokenizer = encoder.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return {
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "template_arguments": encoder.template_arguments,
        "stop_ids": end_tokens(causal_model(model).generation_config.eos_token_id, tokenizer),
    }


def fingerprint(source: str) -> str | None:
    """SHA-256 of an adapter's or a checkpoint's weights; None of a hub name."""
    folder = own_path(source)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from error


def free_memory_of(device: torch.device) -> None:
    """Give cached device memory back: a judge's model is loaded next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
