"""What a model is made of, down to the identity of each part, to see whether something has changed it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Same:
    """Equal to another ``Same`` of the very same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


Picture = dict[str, dict[str, Any]]


def picture(model: nn.Module) -> Picture:
    """Per module: itself, its class, what its configuration says of attention, its own attributes, and what its tables
    hold (submodules, parameters, buffers, hooks); per parameter: itself, device, dtype, whether it requires a gradient,
    and its hooks. Gradients and values are left out.
    """
    found: Picture = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parts: dict[str, Any] = {"itself": Same(module), "class": type(module)}
        parts["attention"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
        for attribute, value in vars(module).items():
            parts[attribute] = (
                {key: Same(entry) for key, entry in value.items()} if isinstance(value, dict) else Same(value)
            )
        found[name] = parts
    for name, parameter in model.named_parameters(remove_duplicate=False):
        hooks = dict(parameter._backward_hooks or {})
        found[f"{name} (parameter)"] = {
            "itself": Same(parameter),
            "where": (parameter.device, parameter.dtype, tuple(parameter.shape)),
            "requires_grad": parameter.requires_grad,
            "hooks": {key: Same(hook) for key, hook in hooks.items()},
        }
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"{name} (buffer)"] = {"itself": Same(buffer), "where": (buffer.device, buffer.dtype)}
    return found


def changed(before: Picture, after: Picture) -> list[str]:
    """Every part that is not as before, as ``module: attribute``."""
    places = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name, {}), after.get(name, {})
        missing = object()
        places += [f"{name}: {part}" for part in {**old, **new} if old.get(part, missing) != new.get(part, missing)]
    return places
