"""The trained LoRA adapter: which layers get one, and putting it there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from torch import nn

from repbend_fast.config.schema import LoraConfig
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.models.coverage import has_conv1d, linear_names, parameter_names
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.load import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
PUBLISHED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that the published recipes name, in their order."""
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""What Phi-3 calls several of them together."""


def adapted_blocks(lora: LoraConfig, last_state: int, num_blocks: int) -> list[int]:
    """The blocks that get LoRA: with ``to_window`` 0 … ``last_state``, capped at the last block (published
    ``transform_layers: -1``).
    """
    if isinstance(lora.blocks, list):
        return list(lora.blocks)
    if lora.blocks == "last_three":
        return list(range(max(0, last_state - 3), min(last_state, num_blocks)))
    return list(range(min(last_state + 1, num_blocks)))


def attach_lora(model: CausalLM, lora: LoraConfig, window: tuple[int, ...]) -> AdaptedLM:
    """Wrap ``model`` in a PEFT model with one trainable LoRA adapter (B = 0, so nothing changes yet), on PEFT's own
    layers.

    Args:
        window: hidden-state indices of the bending terms, of which ``adapted_blocks`` takes the last.

    Raises:
        UserError: a block or a target module that the model does not have, or a head among the targets.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    blocks = find_decoder(model).num_blocks
    wanted = adapted_blocks(lora, max(window), blocks)
    if wanted and max(wanted) >= blocks:
        raise UserError(f"lora.blocks={lora.blocks}: the model has blocks 0 … {blocks - 1}")
    targets = _target_modules(model, lora)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=cast(int, alpha),  # peft takes any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_outside_decoder(model, targets),
        layers_to_transform=wanted,
        layers_pattern=find_decoder(model).place[1],
        fan_in_fan_out=has_conv1d(model, targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        whole = cast("PreTrainedModel", model)
        wrapped = get_peft_model(whole, settings, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora.target_modules={lora.target_modules}: {one_line(error)}") from error
    adapted = cast(AdaptedLM, wrapped)
    for parameter in trainable_parameters(adapted):
        parameter.data = parameter.data.to(DTYPES[lora.dtype])
    adapted.eval()
    return adapted


def check_targets(model: CausalLM, lora: LoraConfig) -> None:
    """Refuse target modules that the model lacks or that cannot be adapted; its weights are not looked at, so it may be
    on ``meta``.

    Raises:
        UserError: names what there is.
    """
    _target_modules(model, lora)


def settled_lora(model: CausalLM, lora: LoraConfig, *, of_all: bool = True) -> LoraConfig:
    """The settings with the names that ``auto`` stands for on this model, whose weights are not looked at.

    ``of_all=False``: the names that this model lacks, which is a part of a larger one, are left out; where it has none
    of them, all of its own stand for them.

    Raises:
        UserError: as ``check_targets``.
    """
    if of_all:
        names = _target_modules(model, lora) if lora.target_modules == "auto" else lora.target_modules
    else:
        present = linear_names(model)
        names = [name for name in lora.target_modules if {name, FUSED.get(name)} & {*present}] or _every_linear(model)
    return lora.model_copy(update={"target_modules": names})


def _every_linear(model: CausalLM) -> list[str]:
    """Names of all linear layers of the blocks that peft adapts as such: the published ones first, in their order."""
    present = linear_names(model)
    order = list(dict.fromkeys(name if name in present else FUSED.get(name, name) for name in PUBLISHED))
    taken = {*_read_as_experts(model, present), *_refused_by_peft(model, present)}
    found = [name for name in present if name not in taken]
    if not found:
        raise UserError(
            f"model type {causal_model(model).config.model_type} cannot be bent: LoRA adapts linear layers, and its "
            f"blocks have {'none' if not present else 'only ' + ', '.join(present) + ', which peft refuses here'}"
        )
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def _refused_by_peft(model: CausalLM, names: list[str]) -> list[str]:
    """Those of which peft says that the family's kernels read their weights past any adapter (Mamba's ``out_proj``)."""
    from peft import LoraConfig as PeftLoraConfig

    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    except ImportError:  # a peft that refuses none
        return []
    refused = []
    for name in names:
        try:
            check(PeftLoraConfig(target_modules=[name]), cast(nn.Module, causal_model(model)), name)
        except ValueError:
            refused.append(name)
    return refused


def _target_modules(model: CausalLM, lora: LoraConfig) -> list[str]:
    """The wanted linear layers, in the family's own spelling: Phi-3 fuses q, k, v and gate, up. Blocks may differ: any
    may have them.
    """
    if lora.target_modules == "auto":
        return _every_linear(model)
    if "lm_head" in lora.target_modules:
        raise UserError(
            "lora.target_modules: lm_head cannot be adapted, its logits are shared with the reference; leave it out"
        )
    present = linear_names(model)
    parameters = parameter_names(model)
    chosen: list[str] = []
    missing: list[str] = []
    for name in lora.target_modules:
        spelled = name if name in present else FUSED.get(name, name)
        if spelled not in present:
            missing.append(name)
        elif spelled not in chosen:
            chosen.append(spelled)
    if missing:
        experts = sorted(parameters & {*missing, *(FUSED.get(name, name) for name in missing)})
        why = (
            f" ({', '.join(experts)}: its experts are parameters, not linear layers, and cannot be adapted)"
            if experts
            else ""
        )
        raise UserError(
            f"lora.target_modules: no layer named {', '.join(missing)} in any block of this model{why}; its linear "
            f"layers are {', '.join(present)} (auto takes all that can be adapted)"
        )
    taken = _read_as_experts(model, chosen)
    if taken:
        left = ", ".join(name for name in present if name not in taken)
        raise UserError(
            f"lora.target_modules: for model type {causal_model(model).config.model_type} peft reads "
            f"{', '.join(taken)} as the experts, "
            "which are parameters, not linear layers, and cannot be adapted; leave these names out; others in its "
            f"blocks are {left}"
        )
    return chosen


def _read_as_experts(model: CausalLM, targets: list[str]) -> list[str]:
    """Those targets that peft would turn into parameters: families whose experts were linear layers before transformers
    fused them.
    """
    from peft import LoraConfig as PeftLoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # a peft that turns nothing into anything else
        return []
    causal = causal_model(model)
    conversions = get_model_conversion_mapping(cast("PreTrainedModel", causal))

    def stays(name: str) -> bool:
        settings = PeftLoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(settings, model=cast(nn.Module, causal), conversions=conversions)
        except ValueError:  # one of the names that make up a fused expert
            return False
        return name in (settings.target_modules or [])

    return [name for name in targets if not stays(name)]


def _outside_decoder(model: CausalLM, targets: list[str]) -> str | None:
    """Pattern of the modules outside the decoder, where some of them bear a target's name: a vision tower has q_proj
    too.
    """
    decoder = find_decoder(model)
    names = [name for name, _ in model.named_modules()]
    prefix = next(name for name, module in model.named_modules() if module is decoder.body)
    inside = f"{prefix}.{decoder.list_name}."
    if any(name.rsplit(".", 1)[-1] in targets and not name.startswith(inside) for name in names):
        return rf"(?!{re.escape(inside)}).*"
    return None


def trainable_parameters(model: CausalLM) -> list[nn.Parameter]:
    """The adapter's parameters, in a fixed order."""
    return [p for p in model.parameters() if p.requires_grad]
