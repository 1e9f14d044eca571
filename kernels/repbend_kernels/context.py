"""What autograd hands to an op's forward and backward, as types."""

from typing import Any, Protocol

from torch import Tensor

Gradients = tuple[object, ...]
"""What a backward returns: for each argument of forward a tensor, a list of them, or None where it has no gradient."""


class Context(Protocol):
    """The object that joins one forward to its backward. An op leaves settings of its own there as attributes: shapes,
    dtypes and choices, which nothing else has to know.
    """

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What ``save_for_backward`` took. Where that was None, so is this; an op knows which of its own can be."""

    @property
    def needs_input_grad(self) -> tuple[Any, ...]:
        """For each argument whether it needs a gradient, or for a list of tensors such a list."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs or outputs, in a way that finds later changes of them."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Say which inputs forward has changed in place."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say which outputs have no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Whether an output that nothing used comes with a gradient of zeros, and not with None."""

    def __getattr__(self, name: str) -> Any:
        """A setting that forward left."""

    def __setattr__(self, name: str, value: object) -> None:
        """Leave a setting for backward."""
