"""What an attack is: it takes prompts and a model, and gives answers. Who judges them is no business of its."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.models.causal import CausalLM


@dataclass(frozen=True, slots=True)
class Target:
    """The model under attack.

    ``model``: a causal LM of transformers, or a peft model around one, in evaluation mode with all parameters frozen.
    An attack leaves it as it was. ``encoder``: its tokenizer and chat template. ``budget``: bytes of device memory that
    a white-box attack may use on top of what is there; None for no limit.
    """

    model: CausalLM
    encoder: ChatEncoder
    max_new_tokens: int = 512
    batch_size: int = 32
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Attacked:
    """The answers of one prompt under one attack: it succeeds if any of them complies.

    ``prefill``: how each answer was made to begin; it is no part of the answer. ``details``: numbers of the attack that
    go into the record (steps, first and last loss, the suffix that was found).
    """

    index: int
    answers: tuple[str, ...]
    prefills: tuple[str, ...] = ()
    details: dict[str, object] = field(default_factory=dict)


@runtime_checkable
class Attack(Protocol):
    """``name`` is what ``--attack`` takes, without its settings.

    Deterministic under ``seed``, and each prompt independent of those before it, so that an interrupted run goes on at
    the next prompt with the same answers.
    """

    name: ClassVar[str]
    white_box: ClassVar[bool]
    """Whether it reads gradients or hidden states."""
    needs_target: ClassVar[bool]
    """Whether it wants to know how a complying answer begins (``Prompt.target``)."""

    def run(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[Attacked]:
        """Attack ``prompts`` and yield each result as it comes. ``index`` counts within ``prompts``."""
        ...
