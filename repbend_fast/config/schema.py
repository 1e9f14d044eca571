"""The typed configuration of a run. Field names are words; published argument names are aliases
(``config/published.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from repbend_fast.data.records import BatchSizes
from repbend_fast.data.settings import DataConfig, PromptsConfig, SourceConfig
from repbend_fast.objectives.registry import any_settings, default_settings, section_of, stream_names
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.section import NonNegative, Positive, Section

Beta = Annotated[float, Field(ge=0, lt=1)]
# Arguments of apply_chat_template that decide what its result is.
TEMPLATE_CALL = {
    *("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"),
    *(
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ),
}
if TYPE_CHECKING:
    AnyObjective = MethodConfig
else:
    AnyObjective = any_settings()


class ModelConfig(Section):
    """Which causal LM to bend and how it is held in memory."""

    name: str = Field(
        description="Hub name, local folder, or `package:NAME` for a model shipped inside an installed Python package."
    )
    gguf_file: str | None = Field(None, description="GGUF file inside `name`, for models that come as one.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    adapter: str | None = Field(
        None, description="PEFT adapter to start from; merged before training, so the reference has it too."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Dtype of the frozen weights, and of computation under NF4."
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="`nf4`: 4-bit NormalFloat through bitsandbytes (QLoRA)."
    )
    double_quantization: bool = Field(True, description="Quantise the NF4 block scales too.")
    attention: str = Field("auto", description="transformers' attn_implementation; `auto` keeps the model's default.")
    liger: bool | Literal["auto"] = Field(
        "auto",
        description="Liger-Kernel's RMSNorm, RoPE and SwiGLU; `auto` = on CUDA, for families that it supports, when "
        "installed.",
    )
    device: str = Field("auto", description="`auto` takes CUDA, then MPS, then CPU; or a torch device.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that ships with the model. Off unless asked for."
    )
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")


class LoraConfig(Section):
    """LoRA through peft. Defaults are the published ones, where those fit any model."""

    r: Positive = Field(16, description="Rank.")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="The adapter counts alpha / r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Of the adapter's input, while training.")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["auto"] = Field(
        "auto",
        description="Linear layers that get LoRA, by the last part of their names; `auto` = all of the decoder blocks: "
        "the published seven where there are no others.",
    )
    blocks: list[NonNegative] | Literal["to_window", "last_three"] = Field(
        "to_window",
        description="Decoder blocks that get LoRA. `to_window` = 0 … max(window), the published `transform_layers: "
        "-1`; `last_three` = "
        "those before the last hidden state that the objective reads.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the adapter's own weights.")


class TrainingConfig(Section):
    """The loop."""

    steps: Positive = Field(300, description="Optimizer steps.")
    examples: Positive = Field(4, description="Examples per micro-batch: B safe, B unsafe, B pairs, B retain.")
    retain_examples: Positive | None = Field(
        None, description="Retain examples per micro-batch, if another number than examples."
    )
    refusal_examples: Positive | None = Field(
        None,
        description="Pairs per micro-batch whose refusals are learned, if more than examples; those beyond are not "
        "bent. Counts where `objective.refusal` does.",
    )
    accumulation: Positive = Field(4, description="Micro-batches per optimizer step.")
    normalize: Literal["micro_batch", "step"] = Field(
        "micro_batch",
        description="What a mean runs over: each micro-batch, whose means are averaged (published), or all rows of the "
        "optimizer step.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw"] = Field(
        "adamw", description="AdamW, or with 8-bit or paged moments through bitsandbytes."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="The highest of the schedule.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Of the learning rate, after the warm-up."
    )
    warmup_steps: NonNegative = Field(0, description="Steps in which the learning rate rises from 0.")
    decay_steps: Positive | None = Field(
        None,
        description="Last steps over which a `linear` or `cosine` schedule falls, constant until then; none = all "
        "after the warm-up.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's, of the adapter alone.")
    # YAML has lists only, so this one type is taken from a list.
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Largest norm of a step's gradient; none = not clipped."
    )
    autocast: Literal["none", "bfloat16", "auto"] = Field(
        "none",
        description="Autocast around both passes, for float32 weights; auto: bfloat16 where the device multiplies in "
        "it natively.",
    )
    nf4_every: Positive | None = Field(
        None,
        description="Every so many steps, both passes run on the blocks' weights rounded to NF4, the adapter merged, "
        "gradients straight through; none = never.",
    )
    seed: NonNegative = Field(
        42,
        description="Decides LoRA's start, dropout, the order of the records, and which of them a limit or "
        "`validation.holdout` takes.",
    )
    checkpoint_every: Positive = Field(50, description="Optimizer steps between resumable checkpoints.")
    keep_checkpoints: Positive = Field(2, description="So many of the last ones stay.")
    log_every: Positive = Field(1, description="Steps between printed lines; metrics.jsonl has every step.")
    threads: NonNegative = Field(0, description="CPU threads; 0 leaves torch's choice.")

    @property
    def sizes(self) -> BatchSizes:
        """Of a micro-batch."""
        return BatchSizes(self.examples, self.retain_examples, self.refusal_examples)


class MemoryConfig(Section):
    """Where memory is spent. The gradient is the same whatever is chosen.

    Without a budget, ``auto`` is one piece per stream, no recomputation and no offload.
    """

    budget: str | None = Field(
        None, description="Memory that training may use, for example 8GB or 7.5GiB; auto = what the device has."
    )
    piece_tokens: Positive | dict[str, Positive] | Literal["auto"] | None = Field(
        "auto",
        description="Tokens per piece of a stream, padding included, for all streams or by stream; none = one piece.",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Pack the sequences of a piece into one row instead of padding. auto: on the CPU, and with varlen "
        "attention.",
    )
    share_beginnings: Literal["auto", "off"] = Field(
        "auto",
        description="Run tokens that all sequences of a packed row begin with, as a system message's, once. auto: on "
        "the CPU without LoRA dropout.",
    )
    merge_streams: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run pieces of different streams in passes that they share, as far as piece_tokens allows. auto: "
        "on CUDA by the plan for a budget; else packed on cards of 40 GB and more.",
    )
    checkpoint_blocks: NonNegative | Literal["all", "auto"] = Field(
        "auto", description="Decoder blocks recomputed in backward, counted from the first."
    )
    offload_checkpoints: bool | Literal["auto"] = Field(
        "auto", description="Keep the inputs of recomputed blocks in host memory."
    )
    offload_embedding: bool | Literal["auto"] = Field(
        "auto", description="Keep input embedding and output head in host memory."
    )
    kl_chunk_rows: Positive | Literal["auto"] | None = Field(
        "auto", description="Rows per chunk of the head's losses; none = the op's size rule."
    )


class DistributedConfig(Section):
    """Several processes that train together, as torchrun, accelerate or Slurm start them."""

    shard: Literal["none", "fsdp"] = Field(
        "none",
        description="`none`: each process holds the whole base. `fsdp`: each holds a part of every decoder block "
        "(FSDP2), for bases that one card cannot hold.",
    )


class ValidationConfig(Section):
    """The over-bending guard: held-out measurements during training."""

    every: NonNegative = Field(0, description="Optimizer steps between validations; 0 switches the guard off.")
    start: NonNegative = Field(0, description="No validation between step 0 and this step: attacks fail late in a run.")
    sources: list[SourceConfig] = Field(
        default_factory=list, description="Held-out records; empty = `holdout` taken from data.sources."
    )
    holdout: Positive = Field(16, description="Records per role held out of training when `sources` is empty.")
    prompts: PromptsConfig | None = Field(
        None, description="Prompts for cheap attack and usefulness rates; none = no generation."
    )
    max_new_tokens: Positive = Field(32, description="Length of an answer to its prompts.")
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        0.2, description="Stop when KL per token (T=1, nats) on held-out chat passes this."
    )
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = Field(
        1.10, description="Stop when perplexity / before exceeds this."
    )
    max_helpful_drop: Annotated[float, Field(ge=0)] | None = Field(
        0.05, description="Allowed drop of the share of helpful ordinary answers."
    )
    max_borderline_drop: Annotated[float, Field(ge=0)] | None = Field(
        0.25, description="The same for borderline questions, which look like restricted ones and come back last."
    )
    target_attack: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Stop early, as reached, at this attack rate."
    )
    target_patience: Positive = Field(
        1, description="Consecutive validations at the target before it counts as reached."
    )
    target_anneal_steps: NonNegative = Field(
        0,
        description="Once the target is reached, let the learning rate fall to 0 over so many steps before stopping; 0 "
        "stops at once.",
    )
    patience: Positive = Field(1, description="Consecutive validations over a limit before training stops.")


class EvaluationConfig(Section):
    """Before/after evaluation at the two ends of a run."""

    sources: list[SourceConfig] = Field(
        default_factory=list,
        description="Chat for perplexity and KL, apart from validation's; empty = validation's held-out `retain` "
        "records.",
    )
    prompts: PromptsConfig | None = Field(
        None, description="Prompts of the measurement before and after; none = nothing is generated."
    )
    max_new_tokens: Positive = Field(64, description="Length of an answer.")
    batch_size: Positive = Field(32, description="Answers that are generated together.")


TrackerName = Literal["tensorboard", "wandb", "trackio"]


class OutputConfig(Section):
    """The run's folder."""

    folder: str = Field("runs/repbend", description="The run's folder; `runs/RECIPE` unless it is set.")
    report: bool = Field(True, description="Write report.html at the end.")
    report_to: list[TrackerName] = Field(
        default_factory=list,
        description="Show metrics there too: tensorboard, wandb, trackio. metrics.jsonl is written always.",
    )


class Config(Section):
    """Everything a run needs, resolved and validated before any weight is loaded."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    objective: AnyObjective = default_settings()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    memory: MemoryConfig = MemoryConfig()
    distributed: DistributedConfig = DistributedConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="before")
    @classmethod
    def _objective_lora(cls, values: Any) -> object:
        """LoRA goes where the method wants it unless the settings say otherwise."""
        objective = values.get("objective") if isinstance(values, dict) else None
        lora = values.get("lora", {}) if isinstance(values, dict) else None
        if not isinstance(objective, dict) or not isinstance(lora, dict):
            return values
        method = section_of(objective.get("name"))
        wanted = method.wanted_lora(objective) if method else {}
        return {**values, "lora": wanted | lora} if wanted else values

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        for reason in combination_errors(self):
            raise ValueError(reason)
        return self


def at_depth(config: Config, num_blocks: int) -> Config:
    """The configuration of a run on a model with ``num_blocks`` blocks: no hidden state of the objective is ``auto``
    any more.
    """
    return config.model_copy(update={"objective": config.objective.at_depth(num_blocks)})


def combination_errors(config: Config) -> Iterator[str]:
    """Settings that are fine alone and impossible together, each as one line that names keys, values and
    the way out.
    """
    model, objective, training, validation = config.model, config.objective, config.training, config.validation
    yield from objective.errors()
    last = objective.last_state
    if isinstance(config.lora.blocks, list):
        blocks = config.lora.blocks
        if not blocks or len(set(blocks)) != len(blocks):
            yield f"lora.blocks={blocks}: must be different block numbers, at least one, or to_window or last_three"
        elif last is not None and min(blocks) >= last:
            yield (
                f"lora.blocks={blocks} lie behind the window, which ends at hidden state {last}; include a block "
                f"below {last}"
            )
    yield from _unknown_streams(config)
    if taken := sorted(TEMPLATE_CALL & config.data.chat_template_kwargs.keys()):
        yield (
            f"data.chat_template_kwargs={{{taken[0]}: …}}: is set by repbend-fast itself; variables of the chat "
            "template go here"
        )
    yield from _impossible_steps(training)
    if training.autocast == "bfloat16" and model.dtype != "float32":
        yield (
            f"training.autocast={training.autocast} is for float32 weights, and model.dtype={model.dtype}; set one "
            "of them to the other's"
        )
    if training.optimizer != "adamw" and config.lora.dtype == "bfloat16" and model.device == "cpu":
        yield (
            f"training.optimizer={training.optimizer} with lora.dtype=bfloat16 does not run on model.device=cpu; "
            "set "
            "lora.dtype=float32"
        )
    if model.liger is True and model.device in ("cpu", "mps"):
        yield f"model.liger=true needs a CUDA device, and model.device={model.device}; set model.liger=auto or false"
    if model.name.startswith("package:") and model.revision is not None:
        yield (
            f"model.revision={model.revision} is for hub models, and model.name={model.name} comes from an "
            "installed "
            "package"
        )
    if config.distributed.shard == "fsdp":
        yield from _undivided(config)
    if validation.target_attack is not None and validation.every and validation.prompts is None:
        yield (
            f"validation.target_attack={validation.target_attack} needs validation.prompts to measure it; name some "
            "or set it to null"
        )
    for source in validation.sources:
        if any(
            (source.path, source.subset, source.split) == (other.path, other.subset, other.split)
            for other in config.data.sources
        ):
            yield (
                f"validation.sources has {source.path} (split {source.split}), which data.sources trains on; name "
                "another split or "
                "file, or leave validation.sources empty to hold records out"
            )


def _impossible_steps(training: TrainingConfig) -> Iterator[str]:
    """Numbers of the loop that do not go together."""
    if training.refusal_examples is not None and training.refusal_examples < training.examples:
        yield (
            f"training.refusal_examples={training.refusal_examples} is less than training.examples="
            f"{training.examples}, whose pairs are all refused; raise it or leave it out"
        )
    if training.warmup_steps > training.steps:
        yield f"training.warmup_steps={training.warmup_steps} is more than training.steps={training.steps}; lower it"
    if training.decay_steps is not None and training.schedule == "constant":
        yield (
            f"training.decay_steps={training.decay_steps} says over which last steps the learning rate falls, and "
            "training.schedule=constant never lowers it; set training.schedule=linear or cosine, or leave it out"
        )
    elif training.decay_steps is not None and training.warmup_steps + training.decay_steps > training.steps:
        yield (
            f"training.warmup_steps={training.warmup_steps} and training.decay_steps={training.decay_steps} are "
            f"more than training.steps={training.steps} together; lower one of them"
        )


def _undivided(config: Config) -> Iterator[str]:
    """What needs a base that one process holds whole."""
    if config.memory.budget is not None:
        yield (
            f"memory.budget={config.memory.budget} plans for a process that holds the whole base, and "
            "distributed.shard=fsdp divides it; set memory.piece_tokens and memory.checkpoint_blocks by hand instead"
        )
    if config.training.nf4_every is not None:
        yield (
            f"training.nf4_every={config.training.nf4_every} rounds whole weights, and distributed.shard=fsdp divides "
            "them; set shard=none, or leave nf4_every out"
        )
    if config.memory.merge_streams == "on":
        yield (
            "memory.merge_streams=on lets processes run passes of different depths, and distributed.shard=fsdp has "
            "them run all passes together; set merge_streams=auto, or shard=none"
        )


def _unknown_streams(config: Config) -> Iterator[str]:
    """Sizes of pieces for streams that nothing has: a recipe may name those of other methods, which it is compared
    with.
    """
    sizes, own = config.memory.piece_tokens, config.objective.stream_names
    if not isinstance(sizes, dict) or own is None:
        return
    for name in sorted(sizes.keys() - stream_names()):
        yield (
            f"memory.piece_tokens.{name}: objective {config.objective.name} has no such stream; it has {', '.join(own)}"
        )
