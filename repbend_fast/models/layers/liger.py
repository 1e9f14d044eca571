"""Liger-Kernel's fused RMSNorm, RoPE and SwiGLU/GeGLU in one loaded model (arXiv 2410.10989).

Liger's own ``_apply_liger_kernel_to_instance`` also replaces classes and functions of transformers for the whole
process; here only the modules of this model change. Both passes of a step run the replaced modules, so equal inputs
give equal bits as before. Liger's losses stay off: the objectives bring their own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.changes import Changes

ROPE = "apply_rotary_pos_emb"
_BOUND = "_on_liger"
Setting = bool | Literal["auto"]


@dataclass(frozen=True)
class Family:
    """How one family of transformers names its modules (``{prefix}RMSNorm`` …) and which variant of Liger's kernels is
    its own.
    """

    package: str
    prefix: str
    gemma: bool = False
    fused_gate: bool = False

    def class_of(self, module: nn.Module) -> str:
        """The class name without the prefix, or '' for a module that is not exactly one of this family's classes."""
        kind = type(module)
        own = (
            kind.__module__ == f"transformers.models.{self.package}.modeling_{self.package}"
            and kind.__name__.startswith(self.prefix)
        )
        return kind.__name__.removeprefix(self.prefix) if own else ""


FAMILIES = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral"),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "gemma2": Family("gemma2", "Gemma2", gemma=True),
    "gemma3_text": Family("gemma3", "Gemma3", gemma=True),
    "phi3": Family("phi3", "Phi3", fused_gate=True),
}
"""By ``model_type`` of the decoder's configuration."""


@dataclass
class Replaceable:
    """Names, within the decoder, of the modules whose forward Liger's kernels take over."""

    family: Family
    norms: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)


def use_liger(model: CausalLM, setting: Setting, device: torch.device, changes: Changes | None = None) -> str | None:
    """Replace what can be replaced, as ``model.liger`` says; a second call changes nothing. Returns as ``liger_note``.

    Raises:
        UserError: as ``liger_note``.
    """
    note = liger_note(model, setting, device)
    if note is None and _is_wanted(setting, device):
        replace_modules(model, changes)
    return note


def liger_note(model: CausalLM, setting: Setting, device: torch.device) -> str | None:
    """A line for the user where ``model.liger=auto`` leaves the model as it is on CUDA, else None. The model is only
    looked at.

    Raises:
        UserError: ``model.liger=true`` where it cannot be: no CUDA, the package missing, another family.
    """
    if not _is_wanted(setting, device):
        return None
    check_liger(setting, device)
    reason = _missing_package() or _unsupported(model)
    if reason is None:
        return None
    if setting is True:
        raise UserError(f"model.liger=true: {reason}; set model.liger=auto or false")
    return f"model.liger: {reason}; the model runs on its own layers"


def _is_wanted(setting: Setting, device: torch.device) -> bool:
    return setting is True or (setting == "auto" and device.type == "cuda")


def check_liger(setting: Setting, device: torch.device) -> None:
    """What can be said before weights are loaded.

    Raises:
        UserError: ``model.liger=true`` without CUDA or without the package.
    """
    if setting is not True:
        return
    if device.type != "cuda":
        raise UserError(
            f"model.liger=true: Liger's kernels need a CUDA device, and this run is on {device.type}; set "
            "model.liger=auto or false"
        )
    if reason := _missing_package():
        raise UserError(f"model.liger=true: {reason}; set model.liger=auto or false")


def find_replaceable(model: CausalLM) -> Replaceable | None:
    """The modules of ``model``'s decoder that Liger has a kernel for; None for a family that it is not used on.

    A class that merely derives from a family's own, or comes with the model's repository, may compute something else:
    it is left alone.
    """
    body = find_decoder(model).body
    family = FAMILIES.get(_model_type(body))
    if family is None:
        return None
    found = Replaceable(family)
    for name, module in body.named_modules():
        kind = family.class_of(module)
        if kind == "RMSNorm":
            found.norms.append(name)
        elif kind == "MLP" and _activation(module, family) == ("gelu_pytorch_tanh" if family.gemma else "silu"):
            found.mlps.append(name)
        elif kind == "Attention" and ROPE in _own_forward(module).__code__.co_names:
            found.attentions.append(name)
    return found


def replace_modules(model: CausalLM, changes: Changes | None = None) -> Replaceable:
    """Bind Liger's forwards to the modules of ``find_replaceable``, in place; a second call changes nothing.

    Parameters and submodules stay as they are. The model must be of a family in ``FAMILIES``, and liger-kernel
    installed.
    """
    found, changes = find_replaceable(model), changes or Changes()
    assert found is not None
    body = find_decoder(model).body
    for name in (*found.norms, *found.mlps, *found.attentions):
        module = body.get_submodule(name)
        if _BOUND in vars(module):
            continue
        with changes.made_by_others(module):
            _bind_liger(module, found.family)
        changes.entry(vars(module), _BOUND, True)
    return found


def _bind_liger(module: nn.Module, family: Family) -> None:
    from liger_kernel.transformers.monkey_patch import (
        _bind_method_to_module,
        _patch_geglu_module,
        _patch_rms_norm_module,
        _patch_swiglu_module,
    )
    from liger_kernel.transformers.swiglu import LigerPhi3SwiGLUMLP, LigerSwiGLUMLP

    kind = family.class_of(module)
    if kind == "RMSNorm":
        # Never in place: autograd may hand the same incoming gradient to another branch.
        offset, mode = (1.0, "gemma") if family.gemma else (0.0, "llama")
        _patch_rms_norm_module(module, offset=offset, casting_mode=mode, in_place=False)
    elif kind == "Attention":
        _bind_method_to_module(module, "forward", _with_global(_own_forward(module), ROPE, _rope))
    elif family.gemma:
        _patch_geglu_module(module)
    else:
        _patch_swiglu_module(module, LigerPhi3SwiGLUMLP if family.fused_gate else LigerSwiGLUMLP)


def uses_liger(module: nn.Module) -> bool:
    """Whether ``replace_modules`` bound another forward to this module."""
    bound = module.__dict__.get("forward")
    if not isinstance(bound, MethodType):
        return False
    return bound.__module__.startswith("liger_kernel.") or bound.__func__.__globals__.get(ROPE) is _rope


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # Not through Liger's dispatch, which warns about every backend that this machine lacks.
    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)


def _own_forward(module: nn.Module) -> FunctionType:
    return cast(FunctionType, inspect.unwrap(type(module).forward))


def _with_global(function: FunctionType, name: str, value: object) -> FunctionType:
    """A copy of ``function`` that sees ``value`` under the global ``name``: transformers calls RoPE as a function of
    its module, and replacing it there would change every model of the process.
    """
    changed = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _activation(module: nn.Module, family: Family) -> str:
    name = getattr(module.config, "hidden_activation" if family.gemma else "hidden_act", "")
    return "silu" if name == "swish" else name


def _model_type(body: nn.Module) -> str:
    return str(getattr(getattr(body, "config", None), "model_type", ""))


def _unsupported(model: CausalLM) -> str | None:
    body = find_decoder(model).body
    if _model_type(body) in FAMILIES:
        return None
    return f"Liger's layers are not used on model type {_model_type(body)} (they are on {', '.join(sorted(FAMILIES))})"


def _missing_package() -> str | None:
    try:
        import liger_kernel.transformers.monkey_patch  # noqa: F401
    except Exception as error:  # beside ImportError, a Triton that finds no compiler or driver fails in its own ways
        return f"liger-kernel cannot be imported ({one_line(error)}); pip install liger-kernel"
    return None
