"""What the sections ``objective`` of several methods have in common. Each method's own stand in its file, with its
streams.

The maths is in docs/objectives.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from repbend_fast.data.records import Role
from repbend_fast.errors import UserError
from repbend_fast.objectives.choices import Auto, DistanceUnit
from repbend_fast.section import AboveZero, NonNegative, Section, Share, StateCount, StateIndex, Weight

PUBLISHED_DEPTH = 32
"""Blocks of the models that hidden states are published for."""


def at_share(state: int, num_blocks: int) -> int:
    """The hidden state of a model with ``num_blocks`` blocks that lies as deep as ``state`` does in one with 32; at
    least 1.
    """
    return max(1, (2 * state * num_blocks + PUBLISHED_DEPTH) // (2 * PUBLISHED_DEPTH))


KL_TERM = "kl"
"""The name of the KL term on the retain stream."""
TITLES = {KL_TERM: "KL on retain conversations", "refusal": "refusal: NLL of the safe answers"}
"""Of the terms that several methods have."""


Aim = Literal["bending", "unlearning", "adversarial"]

Entry = dict[str, Any]
"""An entry of a golden folder's ``expected.json``, as JSON has it; what it lacks is a ``KeyError``."""


def recorded_window(expected: Entry) -> Entry:
    """The window of a golden folder, as settings of :class:`WindowConfig`."""
    window = expected["window"]
    if window != list(range(window[0], window[0] + len(window))):
        raise ValueError(f"window {window} is not a run of consecutive hidden states")
    return {"window_start": window[0], "window_size": len(window)}


class MethodConfig(Section):
    """What the rest of the program asks any objective's settings.

    Class attributes:
        place: where the method stands in lists.
        stream_names: every stream that it may have; None = not known.
        titles: of its terms in a report, in the order in which they are shown.
        layers_title: what its values per hidden state are, in a report.
        published_names: arguments of the published scripts that mean other keys here than with other methods.
        aim: what the method does, where its settings do not say more.
        recorded: reads the settings of a case of a golden folder, ``(case, expected) -> settings``; None = there are no
            such cases.
    """

    place: ClassVar[int] = 100
    stream_names: ClassVar[tuple[str, ...] | None] = None
    titles: ClassVar[dict[str, str]] = {}
    layers_title: ClassVar[str] = "value of its term"
    published_names: ClassVar[dict[str, str]] = {}
    recorded: ClassVar[Any] = None
    aim: ClassVar[Aim] = "bending"

    name: str

    @property
    def kind(self) -> Aim:
        """Under which heading a comparison has these settings."""
        return self.aim

    @property
    @abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """The roles whose records the terms with a weight read. A class without them cannot be made."""

    @classmethod
    def wanted_lora(cls, written: dict[str, object]) -> dict[str, object]:
        """What the method wants of ``lora`` where that is not set: keys and values.

        Args:
            written: the section as it is written, which may not be valid.
        """
        return {}

    @property
    def counts_in_reference(self) -> bool:
        """Whether a distance may count in units of the reference."""
        return getattr(self, "distance_unit", "state") == "reference"

    @property
    def last_state(self) -> int | None:
        """The last hidden state that LoRA has to reach; None = the model's last, or not known before the model's depth
        is.
        """
        return None

    def at_depth(self, num_blocks: int) -> Self:
        """These settings with every ``auto`` replaced by its share of a model with ``num_blocks`` blocks."""
        return self

    @property
    def reads_turns(self) -> bool:
        """Whether a term reads the assistant's earlier turns as such (``Sequence.earlier``)."""
        return getattr(self, "loss_mode", None) == "assistant_turns"

    @property
    def needs_pairs(self) -> bool:
        """Whether a term reads pairs that unsafe records cannot stand in for."""
        return False

    @property
    def replaceable(self) -> frozenset[str]:
        """The roles without which training goes on where there are pairs, their halves being read in the
        same places.
        """
        return frozenset({"safe", "unsafe"})

    @property
    def compares_unsafe(self) -> bool:
        """Whether a term compares unsafe sequences with each other, so that a micro-batch needs two."""
        return False

    def errors(self) -> Iterator[str]:
        """Settings that are fine alone and impossible together, one line each."""
        yield from ()


class KLLimitConfig(MethodConfig):
    """Settings of objectives whose KL on the retain stream may get its weight from a limit
    (``repbend_fast/training/dual.py``).
    """

    kl_key: ClassVar[str] = "kl"

    kl_limit: AboveZero | None = Field(
        None,
        description="Let the KL's weight rise while the KL term of a step is above this and fall while below; none = "
        "constant.",
    )
    kl_rate: AboveZero | None = Field(
        None,
        description="What the weight changes by per step and unit of KL above kl_limit; none = 0.05 x weight / "
        "kl_limit.",
    )
    kl_max: AboveZero | None = Field(
        None, description="The most that the weight may become; none = 10 x the weight it starts from."
    )

    @property
    def kl_weight(self) -> float:
        """The KL's weight, or what it starts from."""
        return float(getattr(self, self.kl_key))

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.kl_limit is None:
            return
        if not self.kl_weight:
            yield (
                f"objective.kl_limit={self.kl_limit:g} needs a weight to start from; set objective.{self.kl_key} "
                "above 0"
            )
        elif self.kl_max is not None and self.kl_max < self.kl_weight:
            yield (
                f"objective.kl_max={self.kl_max:g} is less than objective.{self.kl_key}={self.kl_weight:g}, where "
                "the weight starts"
            )


class ForgettingConfig(KLLimitConfig):
    """Settings of methods that forget answers by their likelihood. Retain terms: retain_nll·NLL + retain_kl·T²KL."""

    aim: ClassVar[Aim] = "unlearning"
    stream_names: ClassVar[tuple[str, ...]] = ("forget", "retain")
    titles: ClassVar[dict[str, str]] = {
        KL_TERM: TITLES[KL_TERM],
        "forget": "forget",
        "nll": "NLL on retain conversations",
    }
    kl_key: ClassVar[str] = "retain_kl"

    loss_mode: Literal["response_all", "assistant_turns"] = Field(
        "response_all", description="Whose tokens are forgotten: the answers', or those of every turn of the assistant."
    )
    retain_nll: Weight = Field(0.0, description="Weight of the retain answers' negative log-likelihood.")
    retain_kl: Weight = Field(0.0, description="Weight of the KL on retain conversations, per token.")
    temperature: AboveZero = Field(1.0, description="Of the KL's soft-max.")

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("unsafe", "pair", "retain") if self.retain_nll or self.retain_kl else ("unsafe", "pair")


class WindowConfig(KLLimitConfig):
    """Settings of objectives that bend a window of hidden states and keep the retain stream by KL."""

    window_start: StateIndex | Auto = Field(
        20,
        description="First hidden state of the window (0 is the embedding output); auto = as deep as 20 of 32 blocks.",
    )
    window_size: StateCount | Auto = Field(
        11, description="Hidden states in the window; auto = as large a share as 11 of 32."
    )
    distance_unit: DistanceUnit = "state"
    alpha_mode: Literal["all", "target"] = Field(
        "all", description="Hidden states of the safe term: all, or the window."
    )
    kl_reduction: Literal["sequence", "token"] = Field(
        "sequence", description="What the KL is summed over before its mean: a sequence (published), or nothing."
    )
    temperature: AboveZero = Field(2.0, description="Of the KL's soft-max.")

    @property
    def window(self) -> tuple[int, ...]:
        """Hidden-state indices that the bending terms read; ``at_depth`` gives settings that have them."""
        if isinstance(self.window_start, str) or isinstance(self.window_size, str):
            raise ValueError("the window is auto until the model's depth is known: use at_depth(num_blocks)")
        return tuple(range(self.window_start, self.window_start + self.window_size))

    @property
    def last_state(self) -> int | None:
        return None if "auto" in (self.window_start, self.window_size) else max(self.window)

    def at_depth(self, num_blocks: int) -> Self:
        start = at_share(20, num_blocks) if self.window_start == "auto" else self.window_start
        size = self.window_size
        if size == "auto":
            size = max(1, min(at_share(11, num_blocks), num_blocks + 1 - int(start)))
        return self.model_copy(update={"window_start": start, "window_size": size})

    def within(self, num_blocks: int) -> Self:
        """The settings for a model with ``num_blocks`` blocks.

        Raises:
            UserError: it has no such window.
        """
        found = self.at_depth(num_blocks)
        if max(found.window) > num_blocks:
            raise UserError(
                f"objective.window_start={found.window_start}, window_size={found.window_size}: the window ends at "
                "hidden state "
                f"{max(found.window)}, but this model has hidden states 0 … {num_blocks}"
            )
        return found

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.last_state == 0:
            yield (
                "objective.window_start=0 with window_size=1 reads the embeddings only, which LoRA cannot move; "
                "choose a window beyond 0"
            )


class RefusalConfig(MethodConfig):
    """Settings of the term that has the safe answers of pairs said, also after the beginning of an unsafe answer."""

    refusal: Weight = Field(
        0.0, description="Weight of the negative log-likelihood per token of the pairs' safe answers."
    )
    recovery_tokens: NonNegative = Field(
        16,
        description="With refusal: safe answers also follow up to this many first tokens of the unsafe answer; 0 = "
        "never.",
    )
    recovery_share: Share = Field(0.5, description="Share of the pairs whose safe answer follows such a start.")
    recovery_separator: str = Field(
        "",
        description="Text between such a start and the safe answer, learned with it; a blank line keeps refusals apart "
        "from the word at which they break off.",
    )

    @property
    def needs_pairs(self) -> bool:
        return self.refusal > 0

    def with_pairs(self, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        """``roles``, each once, and, where the term has a weight, ``pair``."""
        every: tuple[Role, ...] = (*roles, "pair") if self.refusal else roles
        return tuple(dict.fromkeys(every))
