"""The section ``objective``, one class per method; ``objective.name`` says which. The maths is in docs/objectives.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from repbend_fast.config.section import AboveZero, NonNegative, Positive, Section, Share, Weight


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


class ObjectiveSection(Section):
    """What the rest of the program asks any objective's settings."""

    name: str

    @property
    def last_state(self) -> int | None:
        """The last hidden state that LoRA has to reach; None = the model's last."""
        return None

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


class WindowSection(ObjectiveSection):
    """Settings of objectives that bend a window of hidden states and keep the retain stream by KL."""

    window_start: NonNegative = Field(20, description="First hidden state of the window (0 is the embedding output).")
    window_size: Positive = 11
    alpha_mode: Literal["all", "target"] = Field("all", description="Hidden states of the safe term: all, or the window.")
    kl_reduction: Literal["sequence", "token"] = "sequence"
    temperature: AboveZero = 2.0

    @property
    def window(self) -> tuple[int, ...]:
        """Hidden-state indices that the bending terms read."""
        return tuple(range(self.window_start, self.window_start + self.window_size))

    @property
    def last_state(self) -> int | None:
        return max(self.window)

    def errors(self) -> Iterator[str]:
        if max(self.window) == 0:
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
    layers: Annotated[list[Positive], Field(min_length=1)] = Field([10, 20], description="Hidden states that forget rows are rerouted at.")
    schedule_steps: Positive | None = Field(None, description="T of the schedule; none = training.steps.")
    loss_mode: AnswerMode = "prompt_response"
    published_quirks: Quirks = False
    padded_length: PaddedLength = 1024

    @property
    def last_state(self) -> int | None:
        return max(self.layers)


class RMUConfig(ObjectiveSection):
    """RMU: L = MSE(h(forget), c·u) + retain·MSE(h(retain), r(retain)) at one hidden state."""

    name: Literal["rmu"] = "rmu"
    layer: Positive = Field(8, description="Hidden state that is steered: 8 is the output of block 7.")
    coefficient: AboveZero = Field(6.5, description="c, the length of the fixed random direction.")
    retain: Weight = 1200.0
    direction_seed: NonNegative = Field(42, description="Seed of the fixed random direction u.")
    loss_mode: AnswerMode = "prompt_response"
    published_quirks: Quirks = False
    padded_length: PaddedLength = None

    @property
    def last_state(self) -> int | None:
        return self.layer

    @staticmethod
    def trained_modules(layer: int) -> dict[str, Any]:
        """The published choice of what is trained, as settings of ``lora``: the last three blocks before the layer."""
        return {"target_modules": ["down_proj"], "blocks": list(range(max(0, layer - 3), layer))}


class NPOConfig(ObjectiveSection):
    """NPO: L = −(2/β)·mean log σ(β(NLL − NLL_ref)) on forget (+ retain_nll·NLL + retain_kl·T²KL on retain)."""

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
