"""A run's model with its adapters in the weights, one tensor after the other: the files of the base are read as those
of the merged model are written, so that no more than one weight is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from repbend_fast.config import Config
from repbend_fast.errors import one_line
from repbend_fast.exports.low_rank import LowRanks, NotPlainError
from repbend_fast.models.causal import CausalLM, Shape
from repbend_fast.models.load import DTYPES, base_revision, load_model, model_parts, read_model_config
from repbend_fast.models.merge import merge_adapter
from repbend_fast.nearby import own_path
from repbend_fast.runs.stored import Kept, write_in_turn

SHARD_BYTES = 5 << 30
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_STORED = _FLOATS | _OTHERS | {"BOOL": torch.bool}


class Weights(Protocol):
    """The tensors of a checkpoint by name, made when they are asked for."""

    @property
    def kept(self) -> dict[str, Kept]:
        """What each of them is."""

    def __getitem__(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class StreamedWeights:
    """Those of safetensors files, cast to one dtype, each with the products that adapters add to it."""

    files: dict[str, Path]
    kept: dict[str, Kept]
    adapters: list[LowRanks]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            weight = cast(Tensor, file.get_tensor(name)).to(self.kept[name].dtype)
        layer = name.removesuffix(".weight")
        for adapter in self.adapters:
            if name.endswith(".weight") and layer in adapter.layers:
                weight = adapter[layer].added_to(weight)
        return weight


@dataclass(frozen=True)
class LoadedWeights:
    """Those of a model in memory; what is shared is there once."""

    model: CausalLM
    kept: dict[str, Kept] = field(init=False)

    def __post_init__(self) -> None:
        seen: set[int] = set()
        kept: dict[str, Kept] = {}
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen:
                kept[name] = Kept(tensor.dtype, tuple(tensor.shape))
            seen.add(tensor.data_ptr())
        object.__setattr__(self, "kept", kept)

    def __getitem__(self, name: str) -> Tensor:
        return self.model.state_dict()[name]


def merged_weights(config: Config, adapter: Path) -> Weights:
    """The weights of the run's model with every adapter in them, in ``model.dtype`` and never quantised.

    They are streamed where the base lies in safetensors files under the names of its layers and all adapters are plain
    LoRA; else the model is loaded and merged by PEFT.

    Raises:
        UserError: the base or an adapter cannot be read, or an adapter does not fit.
    """
    try:
        return _streamed(config, adapter)
    except NotPlainError:
        return LoadedWeights(_loaded(config, adapter))


def _streamed(config: Config, adapter: Path) -> StreamedWeights:
    source, own = model_parts(config.model)
    if config.model.gguf_file or config.model.trust_remote_code:
        raise NotPlainError("the base is no plain checkpoint")
    if getattr(read_model_config(config.model), "quantization_config", None):
        raise NotPlainError("the base is quantised")
    revision = config.model.revision if source == config.model.name else base_revision(config.model)
    try:
        adapters = [LowRanks(_folder(each)) for each in [*(name for name, _ in own), str(adapter)]]
        files, kept = _layout(_weight_files(source, revision), DTYPES[config.model.dtype])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise NotPlainError(one_line(error)) from error  # loading says what is wrong, or manages
    for each in adapters:
        for layer in each.layers:
            weight, low = kept.get(f"{layer}.weight"), each[layer]
            if weight is None or weight.shape != (low.b.shape[0], low.a.shape[1]):
                raise NotPlainError(f"{layer} has another name or shape in the files")
    return StreamedWeights(files, kept, adapters)


def _folder(adapter: str | Path) -> Path:
    folder = own_path(adapter)
    if not folder.is_dir():
        raise NotPlainError("an adapter from the hub")
    return folder


def _weight_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model's folder, or of its copy in the hub's cache."""
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        index = Path(source) / "model.safetensors.index.json"
        single = Path(source) / "model.safetensors"
    else:
        found = cached_file(source, "model.safetensors.index.json", revision=revision, **_QUIET)
        index = Path(found or "")
        single = Path(cached_file(source, "model.safetensors", revision=revision, **_QUIET) or "")
    if single.is_file():
        return [single]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if Path(source).is_dir():
        return [Path(source) / name for name in names]
    return [Path(cast(str, cached_file(source, name, revision=revision))) for name in names]


_QUIET = {"_raise_exceptions_for_missing_entries": False}


def _layout(files: Iterable[Path], dtype: torch.dtype) -> tuple[dict[str, Path], dict[str, Kept]]:
    where: dict[str, Path] = {}
    kept: dict[str, Kept] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                part = file.get_slice(name)
                stored = _STORED[part.get_dtype()]
                where[name] = path
                kept[name] = Kept(dtype if stored.is_floating_point else stored, tuple(part.get_shape()))
    return where, kept


def _loaded(config: Config, adapter: Path) -> CausalLM:
    settings = config.model.model_copy(update={"quantization": "none", "device": "cpu", "liger": False})
    base = load_model(settings)
    # A GGUF file leaves its own quantisation settings in the config; the merged weights are plain ones.
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.hf_quantizer = None  # type: ignore[attr-defined]
    return merge_adapter(base, str(adapter), "the run's adapter")


def write_model(config: Config, weights: Weights, folder: Path) -> None:
    """An ordinary transformers folder without its tokenizer: configuration, generation settings, weights in shards."""
    if isinstance(weights, LoadedWeights):
        weights.model.save_pretrained(str(folder))
        return
    shape = read_model_config(config.model)
    _say_dtype(shape, config.model.dtype)
    cast(Settings, shape).save_pretrained(str(folder))
    generation_of(config, shape).save_pretrained(str(folder))
    shards = _shards(weights.kept)
    if len(shards) == 1:
        write_in_turn(folder / "model.safetensors", weights.kept, weights.__getitem__)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_in_turn(folder / file, {name: weights.kept[name] for name in names}, weights.__getitem__)
        places |= dict.fromkeys(names, file)
    total = sum(each.size for each in weights.kept.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class Settings(Protocol):
    """A configuration of transformers, of a model or of generation."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write it into a folder."""

    def to_dict(self) -> dict[str, object]:
        """Every setting by name."""


def _say_dtype(shape: Shape, dtype: str) -> None:
    for each in {id(part): part for part in (shape, shape.get_text_config())}.values():
        each.dtype = DTYPES[dtype]  # type: ignore[attr-defined]
    if not shape.architectures:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        shape.architectures = [type(cast(nn.Module, model)).__name__]


def generation_of(config: Config, shape: Shape) -> Settings:
    """The base's settings of generation, stop tokens among them; those that follow from its configuration where it has
    none of its own.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model_parts(config.model)[0])
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(shape)  # type: ignore[arg-type]


def _shards(kept: dict[str, Kept], most: int | None = None) -> list[list[str]]:
    """Names in their order, in groups of at most ``most`` bytes; a larger tensor stands alone."""
    most = SHARD_BYTES if most is None else most
    shards: list[list[str]] = [[]]
    size = 0
    for name, each in kept.items():
        if shards[-1] and size + each.size > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += each.size
    return shards
