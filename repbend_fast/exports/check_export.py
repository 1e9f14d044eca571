"""What was written, loaded again and compared with the model that was trained: logits, what rounding leaves of the
adapter, template and special tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from repbend_fast.assessment.effect_left import EffectSums
from repbend_fast.assessment.few_bits import rounding_to
from repbend_fast.config import Config
from repbend_fast.config.schema import ModelConfig
from repbend_fast.exports.gguf_file import load_gguf
from repbend_fast.exports.probes import Probes
from repbend_fast.models import reference_model
from repbend_fast.models.causal import CausalLM, Shape
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.rounded import rounded_weights
from repbend_fast.models.load import load_model, model_parts
from repbend_fast.models.merge import adapter_apart, put_adapter

FORMATS = ("nf4", "q4_k_m")
"""What the export is rounded to: as QLoRA's users load it, and as Ollama's do."""
KL_BOUNDS = {
    **{"float32": 1e-4, "bfloat16": 0.02, "float16": 0.01},
    **{"q8_0": 0.05, "q5_1": 0.5, "q5_0": 0.5, "q4_1": 1.0, "q4_0": 1.0},
}
"""Nats per position that the export may be away from the trained adapter on unquantised weights, by what it is written
in, or by what it runs in where that is coarser. A wrong merge is off by whole nats; rounding to four bits alone may
cost a small model half of one.
"""
UNDONE = 0.5
"""Share of the adapter's effect below which rounding undoes it."""
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Compared:
    """One form of the export beside the trained model: ``kl`` in nats per position, ``left`` of the adapter's effect
    on the logits, None where that is not known.
    """

    name: str
    largest: float
    kl: float
    left: float | None = None

    def line(self) -> str:
        """As it is printed."""
        left = "" if self.left is None else f"   {self.left:.1%} of the adapter's effect left"
        return f"{self.name:<28} largest logit difference {self.largest:.3g}   KL {self.kl:.3g}{left}"


@dataclass
class Check:
    """``rows[0]`` is the export as it was written, which ``bound`` is for. ``differences``: of template, special tokens
    and header, each a reason to fail.
    """

    what: str
    bound: float
    rows: list[Compared] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why the export is not what was trained; empty where it is."""
        first = self.rows[0]
        far = [] if first.kl <= self.bound else [f"KL {first.kl:.3g} is above {self.bound:.3g}"]
        return far + self.differences

    @property
    def warnings(self) -> list[str]:
        """A line for each format whose rounding undoes the adapter."""
        return [
            f"{row.name} leaves {max(row.left, 0.0):.0%} of what the adapter does to the logits: who runs the model so "
            "gets much of the base's behaviour back; measure it before you pass it on (eval --attack rounding)"
            for row in self.rows[1:]
            if row.left is not None and row.left < UNDONE
        ]

    def as_dict(self) -> dict[str, object]:
        """For the file beside the export."""
        return {
            "measured_on": self.what,
            "bound_kl": self.bound,
            "passed": not self.problems,
            "problems": self.problems,
            "rows": [vars(row) for row in self.rows],
        }


def compare_logits(config: Config, adapter: Path, written: Written, probes: Probes, bound: float | None) -> Check:
    """Run the trained model, in every form, and then what was written.

    Args:
        written: loads what was written; only one model is in memory at a time.
        bound: on the KL, in place of that of ``KL_BOUNDS``.
    """
    usual = max(KL_BOUNDS[written.stored_as], KL_BOUNDS[config.model.dtype])
    check = Check(probes.what, usual if bound is None else bound)
    plain = plain_settings(config)
    with _loaded(plain, adapter) as model:
        with reference_model(model):
            base = _logits(model, probes)
        bent = _logits(model, probes)
        rounded = [_rounded(model, name, config, probes, base, bent) for name in FORMATS]
    with written.model() as exported:
        found = _logits(exported, probes)
    whole = written.stored_as.startswith(("float", "bfloat"))
    check.rows = [_compared(f"as written ({written.stored_as})", base, bent, found, base if whole else None), *rounded]
    if config.model.quantization == "nf4":
        with _loaded(config.model.model_copy(update={"liger": False}), adapter) as trained:
            check.rows.append(_compared("beside the NF4 base's", base, _logits(trained, probes), found, None))
    return check


@dataclass(frozen=True)
class Written:
    """What was exported: ``settings`` load its weights, those of a model without an adapter of its own where
    ``adapter`` goes on top of them; or ``gguf``, a file and the model's shape. ``stored_as``: a dtype, or a format of
    GGUF.
    """

    settings: ModelConfig
    stored_as: str
    adapter: Path | None = None
    gguf: tuple[Path, Shape] | None = None

    @contextmanager
    def model(self) -> Iterator[CausalLM]:
        """The model, which is given up after."""
        if self.gguf is not None:
            yield load_gguf(*self.gguf, self.settings)
        elif self.adapter is None:
            with _loaded(self.settings, None) as model:
                yield model
        else:
            with (
                adapter_apart(model_parts(self.settings)[0]) as source,
                _loaded(self.settings.model_copy(update={"name": source}), self.adapter) as model,
            ):
                yield model


def plain_settings(config: Config) -> ModelConfig:
    """The run's model, unquantised, where it fits: a run on NF4 weights had no room for more on its GPU."""
    device = "cpu" if config.model.quantization == "nf4" else config.model.device
    return config.model.model_copy(update={"quantization": "none", "liger": False, "device": device})


@contextmanager
def _loaded(settings: ModelConfig, adapter: Path | None) -> Iterator[CausalLM]:
    model = load_model(settings)
    try:
        yield model if adapter is None else put_adapter(model, str(adapter), "the run's adapter")
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.no_grad()
def _logits(model: CausalLM, probes: Probes) -> Tensor:
    """[N, V] of the compared positions, float32 in host memory."""
    found = []
    for ids, start in probes.texts:
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        found.append(output.logits[0, start:].float().cpu())
    return torch.cat(found)


def _rounded(model: CausalLM, name: str, config: Config, probes: Probes, base: Tensor, bent: Tensor) -> Compared:
    rounding = rounding_to(name, config.model.double_quantization)
    layers = find_decoder(model).layers
    with rounded_weights(model, layers, rounding, adapter=False):
        noisy = _logits(model, probes)
    with rounded_weights(model, layers, rounding, adapter=True):
        return _compared(f"rounded to {name}", base, bent, _logits(model, probes), noisy)


def _compared(name: str, base: Tensor, bent: Tensor, found: Tensor, noisy: Tensor | None) -> Compared:
    """``noisy``: the base in the form that ``found`` is in; None where it is not known."""
    if found.shape[-1] != bent.shape[-1]:
        width = min(found.shape[-1], bent.shape[-1])
        base, bent, found = base[:, :width], bent[:, :width], found[:, :width]
    sums, total = EffectSums(), 0.0
    for start in range(0, len(bent), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_p, log_q = (each[rows].double().log_softmax(-1) for each in (bent, found))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        if noisy is not None:
            sums.add(base[rows], bent[rows], found[rows], noisy[rows])
    left = None if noisy is None else sums.shares()["survives"]
    return Compared(name, float((found - bent).abs().max()), total / len(bent), left)
