"""What is switched on a model for a while and back again: its adapter, its mode, how it generates, what one module
gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GenerationConfig

from repbend_fast.models.causal import CausalLM

T = TypeVar("T")


class AdapterSwitch(Protocol):
    """What is read and written of a layer of PEFT's."""

    _disable_adapters: bool


def adapter_switches(model: CausalLM) -> list[AdapterSwitch]:
    """The layers that ``reference_model`` switches."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def reference_model(model: CausalLM, switches: list[AdapterSwitch] | None = None) -> Iterator[None]:
    """The model as the user loaded it: trained adapter off, no gradient. Same kernels, so B = 0 gives equal bits.

    The switches alone: PEFT's ``disable_adapter`` also reads every layer's state and sets every parameter's
    ``requires_grad`` twice (docs/log.md has what that costs). ``switches``: the model's, where they are known.
    """
    switches = adapter_switches(model) if switches is None else switches
    earlier = [module._disable_adapters for module in switches]
    for module in switches:
        module._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, disabled in zip(switches, earlier):
            module._disable_adapters = disabled


@contextmanager
def evaluation_mode(model: CausalLM) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode restored after, since a frozen part may already have been in
    evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def generation_settings(model: CausalLM, settings: GenerationConfig) -> Iterator[None]:
    """``settings`` in place of the model's own ``generation_config``."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def output_through(module: nn.Module | None, change: Callable[[T], T]) -> Iterator[None]:
    """What ``module`` gives goes through ``change``; nothing happens without a module."""
    handle = module.register_forward_hook(lambda _, inputs, output: change(output)) if module is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def input_through(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What ``module`` takes as its first argument, or as ``hidden_states``, goes through ``change``."""

    def changed(
        _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, named | {"hidden_states": change(named["hidden_states"])}

    handle = module.register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def added_to(module: nn.Module, part: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``part`` of what ``module`` is given is added to what it gives, whatever kind of layer it is."""
    handle = module.register_forward_hook(lambda _, inputs, output: output + part(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def standing_aside(body: nn.Module, states: Tensor) -> Iterator[None]:
    """While entered, the decoder computes nothing and gives ``states`` [B, T, D] as its result."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    earlier = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        del body.forward
        if earlier is not None:
            body.forward = earlier


@contextmanager
def weights_cast_once(model: CausalLM) -> Iterator[None]:
    """Inside autocast on a CPU, frozen float32 weights of linear layers stand in its dtype while entered.

    Autocast casts those without a gradient at every call, and answers are written a token at a time. Products are the
    same to the bit. The copies take half of the weights' memory, so a GPU, where memory is short, goes on casting.
    """
    dtype = torch.get_autocast_dtype("cpu")
    cast = model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    layers = [m for m in model.modules() if cast and type(m) is nn.Linear and _cast_each_time(m.weight)]
    own = [layer.weight for layer in layers]
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight = weight


def _cast_each_time(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and not weight.requires_grad
