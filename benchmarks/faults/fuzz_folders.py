"""Folders that users bring, for :mod:`benchmarks.faults.fuzz_targets`: adapters and checkpoints of a tiny model."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, cast

from benchmarks.faults.fuzz_draws import Files, as_json, mutated_bytes, mutated_plain

if TYPE_CHECKING:
    from repbend_fast.models.causal import CausalLM


def _files_of(folder: Path, names: tuple[str, ...] = ("*",)) -> Files:
    found = sorted(path for name in names for path in folder.glob(name) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def changed_folder(draw: random.Random, valid: Mapping[str, bytes]) -> Files:
    """One or two files of a folder missing, changed as JSON, or as bytes."""
    files = dict(valid)
    for name in draw.sample(sorted(files), draw.choice((1, 1, 2))):
        if draw.random() < 0.1:
            del files[name]
        elif name.endswith(".json") and draw.random() < 0.7:
            files[name] = as_json(mutated_plain(draw, json.loads(files[name])))
        elif name.endswith(".safetensors") and draw.random() < 0.6:
            files[name] = _changed_header(draw, files[name])
        else:
            files[name] = mutated_bytes(draw, files[name])
    return files


def _changed_header(draw: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = as_json(mutated_plain(draw, json.loads(data[8 : 8 + length])))
    said = len(header) if draw.random() < 0.8 else draw.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", said) + header + data[8 + length :]


class Kit:
    """A tiny model with an adapter, made once: what folders hold, and what they are put on."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from repbend_fast.config import load_config
        from repbend_fast.config.schema import LoraConfig
        from repbend_fast.models import attach_lora
        from repbend_fast.models.causal import CausalLM
        from repbend_fast.runs.folder import RunFolder
        from repbend_fast.training.checkpoint import TrainingState, fixed_settings, save_checkpoint

        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        self.base = cast(CausalLM, LlamaForCausalLM(shape).requires_grad_(False))
        base = copy.deepcopy(self.base)
        self.config = load_config("demo", ["lora.r=2", "lora.target_modules=[q_proj,v_proj]", "model.device=cpu"])
        self.model = attach_lora(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), (1,))
        state = TrainingState(
            step=2,
            sampler={"seed": 0, "places": {}},
            guard={"before": None},
            stopped=None,
            settings=fixed_settings(self.config),
            limits={},
            optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
            scaler={},
            best=None,
            units={1: 2.0},
        )
        self.folder = Path(mkdtemp(prefix="repbend-fuzz-kit-"))
        path = save_checkpoint(RunFolder(self.folder), state, self.model, keep=1, made={})
        self.checkpoint = _files_of(path)
        self.adapter = {name: data for name, data in self.checkpoint.items() if name.startswith("adapter_")}
        shutil.rmtree(self.folder)


kit = cache(Kit)


def adapter(draw: random.Random) -> Files:
    return changed_folder(draw, kit().adapter)


def read_adapter(folder: Path, files: Files) -> None:
    from repbend_fast.exports.low_rank import LowRanks, NotPlainError
    from repbend_fast.models.merge import put_adapter

    with contextlib.suppress(NotPlainError):  # the export then loads the model and says what is wrong
        found = LowRanks(folder)
        for layer in found.layers:
            found[layer].on(found[layer].alone())
    put_adapter(_base(), str(folder), "model.adapter")


def _base() -> CausalLM:
    """A base that no case has changed: the last one's copy where it was refused before it got there."""
    if not _bases or _places(_bases[-1]) != _places(kit().base):
        _bases[:] = [copy.deepcopy(kit().base)]
    return _bases[-1]


_bases: list[CausalLM] = []


def _places(model: CausalLM) -> list[object]:
    return [
        (name, type(module), *vars(module), *(tensor.shape for tensor in module.parameters(recurse=False)))
        for name, module in model.named_modules()
    ]


def checkpoint(draw: random.Random) -> Files:
    files = changed_folder(draw, kit().checkpoint)
    if draw.random() < 0.6 and "manifest.json" in files:
        # The manifest fits what is there, so that reading goes on beyond it.
        import hashlib

        told = {
            n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)}
            for n, d in files.items()
            if n != "manifest.json"
        }
        files["manifest.json"] = as_json({"format": 2, "made_on": {}, "files": told})
    return files


def read_checkpoint(folder: Path, files: Files) -> None:
    from repbend_fast.runs.folder import RunFolder
    from repbend_fast.training.checkpoint import intact_checkpoint, load_checkpoint, made_on, moved_notes

    path = folder / "checkpoints" / "step-000002"
    path.mkdir(parents=True)
    for name in files:
        (folder / name).rename(path / name)
    run = RunFolder(folder)
    found, _ = intact_checkpoint(run)
    assert found == path
    load_checkpoint(path, kit().config, kit().model)
    import torch

    moved_notes(path, made_on(kit().config, torch.device("cpu")), dropout=0.1)
