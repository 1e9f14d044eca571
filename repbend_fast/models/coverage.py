"""What LoRA adapts and NF4 holds of the decoder blocks, by kind of block: names are no promise that a block's weights
bear them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder

WIDE = 4096
"""Matrices of fewer weights (a router, a gate to one number) are counted, and no note is made of them."""

_Key = tuple[bool, str, tuple[tuple[str, int], ...], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one make. ``weights`` of a block's matrices (parameters of two or more dimensions), of them ``adapted``
    by LoRA.

    ``wanted``: the blocks are among those that ``lora.blocks`` names.

    ``left_out``: the others by name, with their number of weights. ``unquantized``: where some matrices are in NF4,
    those that are not.
    """

    name: str
    blocks: tuple[int, ...]
    weights: int
    adapted: int
    wanted: bool = True
    left_out: dict[str, int] = field(default_factory=dict)
    unquantized: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Plain values for metrics.jsonl."""
        return asdict(self) | {"blocks": list(self.blocks)}

    @property
    def where(self) -> str:
        """The blocks by number."""
        return f"blocks {spans(self.blocks)}" if len(self.blocks) > 1 else f"block {self.blocks[0]}"

    def notes(self) -> list[str]:
        """What a user would not expect of these blocks."""
        found = []
        wide = {name: count for name, count in self.left_out.items() if count >= WIDE or count * 20 >= self.weights}
        if self.wanted and wide:
            share = 1 - self.adapted / self.weights
            found.append(
                f"note: LoRA leaves out {share:.0%} of the weights of {self.where} ({self.name}): "
                f"{names_and_sizes(wide)}; linear layers "
                "among them can be named in lora.target_modules, experts and other parameters cannot be adapted"
            )
        loose = {name: count for name, count in self.unquantized.items() if count >= WIDE}
        if loose:
            found.append(
                f"note: model.quantization=nf4 leaves in {self.where} ({self.name}) as they are: "
                f"{names_and_sizes(loose)}"
            )
        return found


def names_and_sizes(sizes: dict[str, int]) -> str:
    """``mlp.experts.down_proj (196,608)``, the largest first."""
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(sizes.items(), key=lambda item: -item[1]))


def spans(numbers: tuple[int, ...]) -> str:
    """``0–3, 5`` of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def coverage_of(model: CausalLM) -> list[BlockKind]:
    """The kinds of the model's decoder blocks, in the order of their first block."""
    kinds: dict[_Key, list[int]] = {}
    made: dict[_Key, tuple[str, dict[str, int], set[str], set[str]]] = {}
    wanted = _wanted_blocks(model)
    for index, block in enumerate(find_decoder(model).layers):
        sizes, adapted, packed = _matrices(block)
        key = (
            index in wanted,
            type(block).__name__,
            tuple(sorted(sizes.items())),
            tuple(sorted(adapted)),
            tuple(sorted(packed)),
        )
        kinds.setdefault(key, []).append(index)
        made.setdefault(key, (type(block).__name__, sizes, adapted, packed))
    found = []
    for key, blocks in kinds.items():
        name, sizes, adapted, packed = made[key]
        left = _summed({n: c for n, c in sizes.items() if n not in adapted})
        loose = _summed({n: c for n, c in sizes.items() if packed and n not in packed})
        found.append(
            BlockKind(name, tuple(blocks), sum(sizes.values()), sum(sizes[n] for n in adapted), key[0], left, loose)
        )
    return found


def _wanted_blocks(model: CausalLM) -> set[int]:
    """The blocks that the trained adapter was to adapt; none for a model without one."""
    adapters = getattr(model, "peft_config", None) or {}
    named = [getattr(settings, "layers_to_transform", None) for settings in adapters.values()]
    every = range(find_decoder(model).num_blocks)
    return {
        block
        for blocks in named
        for block in (every if blocks is None else [blocks] if isinstance(blocks, int) else blocks)
    }


def linear_names(model: CausalLM) -> list[str]:
    """Last names of the linear layers in any decoder block: what ``lora.target_modules`` can hold. A numbered layer has
    the name of its list in front.
    """
    known: dict[type, bool] = {}
    names: set[str] = set()
    for block in find_decoder(model).layers:
        for name, module in block.named_modules():
            if not _is_linear(module):
                continue
            if type(module) not in known:
                known[type(module)] = _maps_rows(module)
            if known[type(module)]:
                names.add(re.search(r"[^.]+(\.\d+)*$", name)[0])  # type: ignore[index]
    return sorted(names)


def parameter_names(model: CausalLM) -> set[str]:
    """Last names of matrices in the decoder blocks that are no layer's weight: experts kept as one parameter, for
    example.
    """
    names = {
        name.rsplit(".", 1)[-1]
        for block in find_decoder(model).layers
        for name, p in block.named_parameters()
        if p.dim() > 1
    }
    return names - {"weight"}


def has_conv1d(model: CausalLM, names: list[str]) -> bool:
    """Whether layers of these names keep their weights transposed, [inputs, outputs], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) and name.rpartition(".")[2] in names
        for block in find_decoder(model).layers
        for name, module in block.named_modules()
    )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _maps_rows(module: nn.Module) -> bool:
    """Whether a linear layer gives one row of outputs for each row of inputs: some classes derive from it and do not (a
    router that also chooses, several layers in one).
    """
    if "forward" not in vars(type(module)) or type(module).__module__.startswith(("torch.", "bitsandbytes.")):
        return True
    parts = {
        name: torch.empty_like(tensor, device="meta")
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, tensor in tensors
    }
    weight = parts["weight"]
    outputs, inputs = weight.shape[-2:] if isinstance(module, nn.Linear) else weight.shape[::-1]
    try:
        result = torch.func.functional_call(module, parts, torch.empty(3, inputs, dtype=weight.dtype, device="meta"))
    except Exception:  # whatever its forward may raise for want of other arguments
        return False
    return isinstance(result, torch.Tensor) and result.shape == (3, outputs)


def _matrices(block: nn.Module) -> tuple[dict[str, int], set[str], set[str]]:
    """Weights of each matrix by name, and the names of those that LoRA adapts and of those in NF4."""
    sizes: dict[str, int] = {}
    adapted: set[str] = set()
    packed: set[str] = set()
    for full, parameter in block.named_parameters():
        if ".lora_" in full:
            continue
        path, _, last = full.rpartition(".")
        module: Any = block.get_submodule(path)
        state = getattr(parameter, "quant_state", None)
        is_packed = state is not None or (hasattr(module, "quant_type") and last == "weight")
        if parameter.dim() < 2 and not is_packed:
            continue
        name = full.replace(".base_layer", "").removesuffix(".weight")
        sizes[name] = module.in_features * module.out_features if is_packed else parameter.numel()
        if is_packed:
            packed.add(name)
        if path.endswith("base_layer"):
            adapted.add(name)
    return sizes, adapted, packed


def _summed(sizes: dict[str, int]) -> dict[str, int]:
    """Numbered parts (``experts.0.w1``, ``experts.1.w1``) under one name."""
    found: dict[str, int] = {}
    for name, count in sizes.items():
        name = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        found[name] = found.get(name, 0) + count
    return found
