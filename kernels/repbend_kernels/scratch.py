"""What an op needs inside of itself and frees again, in bytes: one rule for each op, registered beside it.

No tensor outside shows such memory, so whoever plans what a step takes asks here. A rule takes those of the op's
arguments that it names, real tensors or fake ones, and the ``device`` that is planned for. It bounds every path of the
op from above; 0 is a rule too.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .rows import block_rows

__all__ = ["scratch_bytes", "scratch_rules"]

NAMESPACE = "repbend_kernels"
Rule = Callable[..., int]
_RULES: dict[str, Rule] = {}


def scratch_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of the ops ``repbend_kernels::name``."""

    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[f"{NAMESPACE}::{name}"] = rule
        return rule

    return register


def scratch_rules() -> dict[str, Rule]:
    """Every rule by its op's name, ``repbend_kernels::linear_kl_div``."""
    return dict(_RULES)


@cache
def _wanted(name: str) -> tuple[tuple[int, str], ...]:
    """``(place among the op's arguments, name)`` of each argument that the rule takes."""
    op = getattr(getattr(torch.ops, NAMESPACE), name.removeprefix(f"{NAMESPACE}::")).default
    taken = inspect.signature(_RULES[name]).parameters
    return tuple((place, a.name) for place, a in enumerate(op._schema.arguments) if a.name in taken)


def scratch_bytes(name: str, device: torch.device, arguments: Sequence[object]) -> int:
    """Bytes inside one call of an op.

    Args:
        name: with its namespace, ``repbend_kernels::linear_kl_div``.
        device: that is planned for, wherever the arguments lie.
        arguments: the call's, by position.

    Raises:
        KeyError: an op that has no rule.
    """
    rule = _RULES[name]
    return int(rule(device=device, **{argument: arguments[place] for place, argument in _wanted(name)}))


def in_blocks(device: torch.device, count: int, elements: int) -> int:
    """``count`` float32 blocks of a walk over ``elements`` (``rows.blocks``)."""
    return count * 4 * min(block_rows(1, device), elements)


def largest(*tensors: Tensor | None) -> int:
    """Elements of the largest of ``tensors``."""
    return max((tensor.numel() for tensor in tensors if tensor is not None), default=0)
