"""LoRA as its files hold it, layer by layer, without a model: to add it to a weight, and to put one on another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from repbend_fast.errors import one_line
from repbend_fast.models.merge import adapter_settings

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_HARMLESS_STARTS = ("gaussian", "eva")
_PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "eva_config", "loftq_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
    *("megatron_config", "megatron_core", "runtime_config"),
}
"""Settings that say where products are, and how large."""


@dataclass(frozen=True)
class LowRank:
    """``scale`` · B A of one linear layer: ``a`` [R, D_in], ``b`` [D_out, R], of whatever dtype was stored."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight`` [D_out, D_in] + scale · B A, in float32 (float64 for such a weight) and rounded once, to the
        weight's dtype.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + self.scale * (self.b.to(wide) @ self.a.to(wide))).to(weight.dtype)

    def on(self, below: LowRank) -> LowRank:
        """Both at once, at scale 1: ranks add up."""
        parts = (below, self)
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return LowRank(
            torch.cat([part.a.to(wide) for part in parts]),
            torch.cat([part.scale * part.b.to(wide) for part in parts], dim=1),
            1.0,
        )

    def alone(self) -> LowRank:
        """The same at scale 1."""
        return LowRank(self.a, self.scale * self.b, 1.0)

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


class NotPlainError(Exception):
    """An adapter that is more than low-rank products of linear layers; the text says what it has."""


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except NotPlainError:
        raise
    except Exception as error:  # peft takes settings as they are, and trips over one anywhere
        raise NotPlainError(f"it cannot be read: {one_line(error)}") from error


class LowRanks:
    """The low-rank products in a PEFT folder, by the layer's name in the model; read when they are asked for.

    Raises:
        NotPlainError: an adapter of another kind, with anything besides, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        with _reading():
            self._open(folder)

    def _open(self, folder: Path) -> None:
        from peft import LoraConfig

        settings = adapter_settings(str(folder))
        if not isinstance(settings, LoraConfig):
            raise NotPlainError(f"its kind is {settings.peft_type}")
        self._settings = settings
        self._path = folder / "adapter_model.safetensors"
        if not self._path.is_file():
            raise NotPlainError("it has no adapter_model.safetensors")
        if found := _more_than_products(settings):
            raise NotPlainError(f"it sets {found}")
        with safe_open(self._path, framework="pt") as file:
            self.keys = set(file.keys())
        self.layers = sorted(key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in self.keys)
        self.layers = [name for name in self.layers if f"{_PREFIX}{name}.lora_A.weight" in self.keys]
        products = {f"{_PREFIX}{name}.lora_{side}.weight" for name in self.layers for side in "AB"}
        if products != self.keys:
            raise NotPlainError(f"it has {min(products ^ self.keys)}")

    def __getitem__(self, layer: str) -> LowRank:
        with _reading():
            with safe_open(self._path, framework="pt") as file:
                a, b = (file.get_tensor(f"{_PREFIX}{layer}.lora_{side}.weight") for side in "AB")
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise NotPlainError(f"{layer} has no product of {tuple(b.shape)} and {tuple(a.shape)}")
            return LowRank(a, b, _scale(self._settings, layer, a.shape[0]))


def _more_than_products(settings: LoraConfig) -> str | None:
    """The first setting, apart from those that leave a layer its weight plus a product, that is not PEFT's default."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for name, value in settings.to_dict().items():
        if name == "init_lora_weights" and (isinstance(value, bool) or value in _HARMLESS_STARTS):
            continue  # others, PiSSA for one, change the weight below
        if name not in _PLAIN and value != usual.get(name):
            return str(name)
    return None


def _scale(settings: LoraConfig, layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = settings.alpha_pattern or {}
    key = get_pattern_key(list(patterns), layer)
    alpha = patterns.get(key, settings.lora_alpha)
    return alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
