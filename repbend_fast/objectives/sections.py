"""The section ``objective``, one class per method; ``objective.name`` says which. The maths is in docs/objectives.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag

from repbend_fast.section import AboveZero, NonNegative, Positive, Section, Share, Weight


def _published_mode(value: Any) -> Any:
    return "prompt_" + value.removeprefix("request_") if isinstance(value, str) and value.startswith("request_") else value


PROMPT_MODES = ("prompt_last", "prompt_all")
"""The loss modes that read no answers."""
# The published code says `request_…` where its README says `prompt_…`.
LossMode = Annotated[Literal["prompt_last", "prompt_all", "prompt_response", "response_all"], BeforeValidator(_published_mode)]
AnswerMode = Annotated[
    Literal["prompt_response", "response_all"],
    Field(description="Rows that the bending terms read: all, or the answers'. Prompts share a template, which ordinary ones need too."),
]
Quirks = Annotated[bool, Field(description="Reproduce slips of the published code (docs/objectives.md).")]
PaddedLength = Annotated[
    Positive | None, Field(description="With published_quirks: the length that every sequence is counted as; none = the batch's longest.")
]


Auto = Literal["auto"]
DistanceUnit = Annotated[
    Literal["state", "reference"],
    Field(description="What distances count in: the states' own length, or the median norm of each hidden state's reference rows."),
]
PUBLISHED_DEPTH = 32
"""Blocks of the models that hidden states are published for."""


def at_share(state: int, num_blocks: int) -> int:
    """The hidden state of a model with ``num_blocks`` blocks that lies as deep as ``state`` does in one with 32; at least 1."""
    return max(1, (2 * state * num_blocks + PUBLISHED_DEPTH) // (2 * PUBLISHED_DEPTH))


class ObjectiveSection(Section):
    """What the rest of the program asks any objective's settings."""

    name: str

    @property
    def last_state(self) -> int | None:
        """The last hidden state that LoRA has to reach; None = the model's last, or not known before the model's depth is."""
        return None

    def at_depth(self, num_blocks: int) -> Self:
        """These settings with every ``auto`` replaced by its share of a model with ``num_blocks`` blocks."""
        return self

    @property
    def needs_pairs(self) -> bool:
        """Whether a term reads pairs that unsafe records cannot stand in for."""
        return False

    @property
    def replaceable(self) -> frozenset[str]:
        """The roles without which training goes on where there are pairs, their halves being read in the same places."""
        return frozenset({"safe", "unsafe"})

    @property
    def compares_unsafe(self) -> bool:
        """Whether a term compares unsafe sequences with each other, so that a micro-batch needs two."""
        return False

    def errors(self) -> Iterator[str]:
        """Settings that are fine alone and impossible together, one line each."""
        yield from ()


class KLLimitSection(ObjectiveSection):
    """Settings of objectives whose KL on the retain stream may get its weight from a limit (``repbend_fast/training/dual.py``)."""

    kl_key: ClassVar[str] = "kl"

    kl_limit: AboveZero | None = Field(
        None, description="Let the KL's weight rise while the KL term of a step is above this and fall while below; none = constant."
    )
    kl_rate: AboveZero | None = Field(
        None, description="What the weight changes by per step and unit of KL above kl_limit; none = 0.05 x weight / kl_limit."
    )
    kl_max: AboveZero | None = Field(None, description="The most that the weight may become; none = 10 x the weight it starts from.")

    @property
    def kl_weight(self) -> float:
        """The KL's weight, or what it starts from."""
        return float(getattr(self, self.kl_key))

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.kl_limit is None:
            return
        if not self.kl_weight:
            yield f"objective.kl_limit={self.kl_limit:g} needs a weight to start from; set objective.{self.kl_key} above 0"
        elif self.kl_max is not None and self.kl_max < self.kl_weight:
            yield f"objective.kl_max={self.kl_max:g} is less than objective.{self.kl_key}={self.kl_weight:g}, where the weight starts"


class WindowSection(KLLimitSection):
    """Settings of objectives that bend a window of hidden states and keep the retain stream by KL."""

    window_start: NonNegative | Auto = Field(
        20, description="First hidden state of the window (0 is the embedding output); auto = as deep as 20 of 32 blocks."
    )
    window_size: Positive | Auto = Field(11, description="Hidden states in the window; auto = as large a share as 11 of 32.")
    distance_unit: DistanceUnit = "state"
    alpha_mode: Literal["all", "target"] = Field("all", description="Hidden states of the safe term: all, or the window.")
    kl_reduction: Literal["sequence", "token"] = "sequence"
    temperature: AboveZero = 2.0

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

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.last_state == 0:
            yield "objective.window_start=0 with window_size=1 reads the embeddings only, which LoRA cannot move; choose a window beyond 0"


class RefusalSection(ObjectiveSection):
    """Settings of the term that has the safe answers of pairs said, also after the beginning of an unsafe answer."""

    refusal: Weight = Field(0.0, description="Weight of the negative log-likelihood per token of the pairs' safe answers.")
    recovery_tokens: NonNegative = Field(
        16, description="With refusal: safe answers also follow up to this many first tokens of the unsafe answer; 0 = never."
    )
    recovery_share: Share = Field(0.5, description="Share of the pairs whose safe answer follows such a start.")

    @property
    def needs_pairs(self) -> bool:
        return self.refusal > 0


class ObjectiveConfig(RefusalSection, WindowSection):
    """RepBend: L = safe·S − unsafe·U + cosine·C + kl·K (+ pair·P + refusal·F), all weights ≥ 0."""

    name: Literal["repbend"] = "repbend"
    safe: Weight = 0.5
    unsafe: Weight = 0.5
    cosine: Weight = 0.1
    kl: Weight = 0.3
    pair: Weight = 0.0
    unsafe_limit: AboveZero | None = Field(
        None, description="A row's unsafe distance counts up to this multiple of its reference's norm; none = no bound, as published."
    )
    loss_mode: LossMode = "response_all"
    pair_positions: Positive = 20
    published_quirks: Quirks = False

    @property
    def needs_pairs(self) -> bool:
        return self.pair > 0 or super().needs_pairs

    @property
    def replaceable(self) -> frozenset[str]:
        # Where prompts alone count, the safe ones are those of safe records: a pair's asks for something unsafe.
        return frozenset({"unsafe"}) if self.loss_mode in PROMPT_MODES else super().replaceable

    @property
    def compares_unsafe(self) -> bool:
        return self.cosine > 0

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.cosine == 0 and self.pair == 0 and self.refusal == 0:
            yield (
                "objective.cosine=0 with objective.pair=0: the other terms have no gradient while LoRA is at its start, so nothing would "
                "ever train; give one of the two, or objective.refusal, a weight above 0"
            )


class CircuitBreakerConfig(RefusalSection):
    """Circuit Breakers (representation rerouting): L = c_r·mean ‖h − r‖ on retain + c_f·mean relu(cos(h, r)) on forget."""

    name: Literal["circuit_breaker"] = "circuit_breaker"
    coefficient: AboveZero = Field(10.0, description="a of c_r = a·t/(2T) and c_f = a·(1 − t/(2T)); published: 10 Llama-3, 5 Mistral.")
    layers: Annotated[list[Positive], Field(min_length=1)] | Auto = Field(
        [10, 20], description="Hidden states that forget rows are rerouted at; auto = as deep as 10 and 20 of 32 blocks."
    )
    distance_unit: DistanceUnit = "state"
    schedule_steps: Positive | None = Field(None, description="T of the schedule; none = training.steps.")
    loss_mode: AnswerMode = "prompt_response"
    published_quirks: Quirks = False
    padded_length: PaddedLength = 1024

    @property
    def last_state(self) -> int | None:
        return None if isinstance(self.layers, str) else max(self.layers)

    def at_depth(self, num_blocks: int) -> Self:
        layers = sorted({at_share(10, num_blocks), at_share(20, num_blocks)}) if self.layers == "auto" else self.layers
        return self.model_copy(update={"layers": layers})


class RMUConfig(ObjectiveSection):
    """RMU: L = MSE(h(forget), c·u) + retain·MSE(h(retain), r(retain)) at one hidden state."""

    name: Literal["rmu"] = "rmu"
    layer: Positive | Auto = Field(8, description="Hidden state that is steered: 8 is the output of block 7; auto = as deep as 8 of 32.")
    distance_unit: DistanceUnit = "state"
    coefficient: AboveZero = Field(6.5, description="c, the length of the fixed random direction, in distance_unit.")
    retain: Weight = 1200.0
    direction_seed: NonNegative = Field(42, description="Seed of the fixed random direction u.")
    loss_mode: AnswerMode = "prompt_response"
    published_quirks: Quirks = False
    padded_length: PaddedLength = None

    @property
    def last_state(self) -> int | None:
        return None if isinstance(self.layer, str) else self.layer

    def at_depth(self, num_blocks: int) -> Self:
        return self.model_copy(update={"layer": at_share(8, num_blocks) if self.layer == "auto" else self.layer})

    @staticmethod
    def trained_modules(layer: int | Auto) -> dict[str, Any]:
        """The published choice of what is trained, as settings of ``lora``: the last three blocks before the layer."""
        blocks = "last_three" if isinstance(layer, str) else list(range(max(0, layer - 3), layer))
        return {"target_modules": ["down_proj"], "blocks": blocks}


class NPOConfig(KLLimitSection):
    """NPO: L = −(2/β)·mean log σ(β(NLL − NLL_ref)) on forget (+ retain_nll·NLL + retain_kl·T²KL on retain)."""

    kl_key: ClassVar[str] = "retain_kl"

    name: Literal["npo"] = "npo"
    beta: AboveZero = 0.1
    retain_nll: Weight = 0.0
    retain_kl: Weight = 0.0
    temperature: AboveZero = 2.0
    published_quirks: Quirks = False


class CRLConfig(RefusalSection, WindowSection):
    """CRL: triplets around the mean adapted unsafe state, safe·S + unsafe·U + kl·K."""

    name: Literal["crl"] = "crl"
    safe: Weight = 0.5
    unsafe: Weight = 0.6
    kl: Weight = 0.7
    safe_margin: Weight = 2.0
    unsafe_margin: Weight = 3.0
    loss_mode: AnswerMode = "response_all"

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        if self.safe == 0 and self.unsafe == 0 and self.refusal == 0:
            yield (
                "objective.safe=0 with objective.unsafe=0: KL alone has no gradient while LoRA is at its start; give one, or "
                "objective.refusal, a weight above 0"
            )


class CustomObjectiveConfig(ObjectiveSection):
    """An objective of your own: ``name: package.module:Class``, its settings under ``settings``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    settings: dict[str, Any] = Field(default_factory=dict, description="Handed to the class as they are.")

    @property
    def needs_pairs(self) -> bool:
        return True

    @property
    def replaceable(self) -> frozenset[str]:
        return frozenset()  # what the class does without a role is not known


SECTIONS: dict[str, type[ObjectiveSection]] = {
    section.model_fields["name"].default: section for section in (ObjectiveConfig, CircuitBreakerConfig, RMUConfig, NPOConfig, CRLConfig)
}
CUSTOM = "custom"


def section_of(name: Any) -> type[ObjectiveSection] | None:
    """The section of the objective ``name``, None for an unknown one."""
    return CustomObjectiveConfig if isinstance(name, str) and ":" in name else SECTIONS.get(name) if isinstance(name, str) else None


def _tag(value: Any) -> str | None:
    name = value.get("name", "repbend") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return CUSTOM if ":" in name else name


AnyObjective = Annotated[
    Annotated[ObjectiveConfig, Tag("repbend")]
    | Annotated[CircuitBreakerConfig, Tag("circuit_breaker")]
    | Annotated[RMUConfig, Tag("rmu")]
    | Annotated[NPOConfig, Tag("npo")]
    | Annotated[CRLConfig, Tag("crl")]
    | Annotated[CustomObjectiveConfig, Tag(CUSTOM)],
    Discriminator(_tag),
]
