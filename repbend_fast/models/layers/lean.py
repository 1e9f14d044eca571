"""Norms and gated MLPs of one model that keep less for backward, with the values of the layers that they stand for.

Only what the modules do with their inputs changes: the operations are Liger's where ``layers.liger`` bound them,
elsewhere those of ``repbend_kernels``; what comes out can be made again in backward (``layers.recompute``). Of a block
of a Llama with 32-bit states that leaves 4 D + 2 I elements per token, keys and values apart, of 6 D + 4 I; D is the
width of a hidden state, I the MLP's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from repbend_kernels import Activation, gated_product, rms_norm
from torch import Tensor, nn

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.liger import find_replaceable, uses_liger
from repbend_fast.models.layers.recompute import recomputable

_MAKE = "_lean_make"


class _Norm(Protocol):
    weight: nn.Parameter

    def forward(self, hidden: Tensor) -> Tensor: ...


class _Lean(Protocol):
    """A module with a lean forward: what was bound to it."""

    _lean_make: Callable[..., Tensor]


class _Mlp(_Lean, Protocol):
    gate_proj: nn.Module
    up_proj: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module


def use_lean_layers(model: CausalLM, changes: Changes | None = None) -> None:
    """Bind lean forwards to the norms and MLPs of the families in ``liger.FAMILIES``, in place; a second call changes
    nothing.

    Parameters, submodules and classes stay; other families, derived classes and other activations are left alone.
    """
    changes, found = changes or Changes(), find_replaceable(model)
    if found is None:
        return
    body, family = find_decoder(model).body, found.family
    for name in found.norms:
        norm: Any = body.get_submodule(name)
        eps = norm.eps if family.gemma else norm.variance_epsilon
        # A forward that Liger bound to a norm is the whole norm.
        _bind(changes, norm, _norm_forward, norm.__dict__.get("forward") or partial(_own_norm, norm, eps, family.gemma))
    activation: Activation = "gelu_tanh" if family.gemma else "silu"
    for name in found.mlps:
        mlp = body.get_submodule(name)
        if uses_liger(mlp):
            _bind(
                changes,
                mlp,
                _liger_fused_mlp_forward if family.fused_gate else _mlp_forward,
                _liger_product(activation),
            )
        else:
            _bind(
                changes,
                mlp,
                _fused_mlp_forward if family.fused_gate else _mlp_forward,
                partial(gated_product, activation=activation),
            )


def _bind(changes: Changes, module: nn.Module, forward: Callable[..., Tensor], make: Callable[..., Tensor]) -> None:
    if _MAKE in vars(module):
        return
    changes.entry(vars(module), _MAKE, make)
    # Not a bound method: pickle would look for it under its name in the class.
    changes.entry(vars(module), "forward", partial(forward, module))


def _own_norm(module: _Norm, eps: float, gemma: bool, hidden: Tensor) -> Tensor:
    if module.weight.requires_grad:  # some other training than this one
        return type(module).forward(module, hidden)
    return rms_norm(hidden, module.weight, eps, gemma)


def _norm_forward(self: _Lean, hidden: Tensor) -> Tensor:
    return recomputable(self._lean_make, hidden)


def _mlp_forward(self: _Mlp, x: Tensor) -> Tensor:
    return self.down_proj(recomputable(self._lean_make, self.gate_proj(x), self.up_proj(x)))


def _fused_mlp_forward(self: _Mlp, x: Tensor) -> Tensor:
    return self.down_proj(recomputable(self._lean_make, *self.gate_up_proj(x).chunk(2, dim=-1)))


def _liger_fused_mlp_forward(self: _Mlp, x: Tensor) -> Tensor:
    # Liger copies what is not contiguous: the halves and the whole would be kept.
    gate, up = (half.contiguous() for half in self.gate_up_proj(x).chunk(2, dim=-1))
    return self.down_proj(recomputable(self._lean_make, gate, up))


def _liger_product(activation: Activation) -> Callable[..., Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Its backward writes into gate and up; down_proj's, which makes the product of them again, comes first.
    return LigerSiLUMulFunction.apply if activation == "silu" else LigerGELUMulFunction.apply
