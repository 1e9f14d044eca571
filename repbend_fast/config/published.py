"""Argument names of the published implementation, and what they mean here.

A command line of the published ``train.sh`` carries over word for word. Each name is either renamed, translated,
accepted and ignored with a note, or refused where obeying it would mean something that this program does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

from repbend_fast.config.schema import TrackerName
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE, SETTINGS

Settings = list[tuple[str, object]]

RENAMED: dict[str, str] = {
    # The order alpha … eta is the published code's; the paper writes alpha, beta, gamma for unsafe, cosine, KL.
    "alpha": "objective.safe",
    "beta": "objective.unsafe",
    "gamma": "objective.cosine",
    "epsilon": "objective.kl",
    "eta": "objective.pair",
    "loss_alpha": "objective.safe",
    "loss_beta": "objective.unsafe",
    "loss_gamma": "objective.cosine",
    "loss_epsilon": "objective.kl",
    "loss_eta": "objective.pair",
    "target_layer_start_idx": "objective.window_start",
    "layers_window_size": "objective.window_size",
    "alpha_mode": "objective.alpha_mode",
    "paired_repr_length": "objective.pair_positions",
    "model_name_or_path": "model.name",
    "adapter_name_or_path": "model.adapter",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "max_step": "training.steps",
    "max_steps": "training.steps",
    "per_device_train_batch_size": "training.examples",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "warmup_steps": "training.warmup_steps",
    "max_grad_norm": "training.clip_norm",
    "adam_epsilon": "training.eps",
    "seed": "training.seed",
    "logging_steps": "training.log_every",
    "save_steps": "training.checkpoint_every",
    "output_dir": "output.folder",
    # The published `split` is the hub's name of a configuration; rows always come from its split `train`.
    "dataset_path": "data.sources.wildguardmix.path",
    "dataset_split": "data.sources.wildguardmix.subset",
}

# The same script names the other methods' settings with the same letters.
RENAMED_FOR: dict[str, dict[str, str]] = {name: settings.published_names for name, settings in SETTINGS.items()}

_REPORTS = "metrics are written to metrics.jsonl of the run"
_STEPS = "the length of a run is training.steps"
_VALIDATES = "held-out checks are set by validation.every"

IGNORED: dict[str, str] = {
    "tf32": "the precision of float32 matrix products is left to torch",
    "do_train": "`train` trains",
    "do_eval": _VALIDATES,
    "evaluation_strategy": _VALIDATES,
    "eval_strategy": _VALIDATES,
    "eval_steps": _VALIDATES,
    "per_device_eval_batch_size": "the evaluation's batch is evaluation.batch_size",
    "save_strategy": "checkpoints are set by training.checkpoint_every",
    "save_total_limit": "checkpoints kept are set by training.keep_checkpoints",
    "overwrite_output_dir": "an earlier run in the folder is moved aside, never overwritten",
    "num_train_epochs": _STEPS,
    "logging_strategy": "every training.log_every steps are logged",
    "logging_first_step": "every training.log_every steps are logged",
    "dataset_mode": "the published code does not use it",
    "use_lora": "the published code does not use it; LoRA is always on",
    "max_seq_length": "the published code cuts prompts and answers at 512 tokens each whatever this says; "
    "see data.max_prompt_tokens and data.max_answer_tokens",
    "cache_dir": "the hub's cache is set by HF_HOME",
    "remove_unused_columns": "data columns are chosen by the format",
    "ddp_find_unused_parameters": "training runs on one device",
    "local_rank": "training runs on one device",
}

# name: (the values that change nothing, what to do instead of the others)
FIXED: dict[str, tuple[tuple[object, ...], str]] = {
    "is_online": ((False,), "False: answers sampled and classified during training are not supported"),
    "full_layers": ((True,), "True: the model is never cut short, passes that need no head stop early by themselves"),
    "fp16": ((False,), "False: set model.dtype=float16 for float16 weights"),
    "lora_bias": (("none",), "none: biases are not trained"),
    "lora_weight_path": (("", None), "empty: set model.adapter for an adapter to start from"),
    "adv_string": (("", None), "empty: nothing is put before the answers"),
    "warmup_ratio": ((0, 0.0), "0: set training.warmup_steps"),
    "deepspeed": ((None,), "absent: training runs on one device"),
    "adam_beta1": ((0.9,), "0.9: set training.betas=[…, …]"),
    "adam_beta2": ((0.999,), "0.999: set training.betas=[…, …]"),
}


@dataclass(frozen=True)
class Translation:
    """What a published argument becomes: settings by dotted name, and notes for the user."""

    settings: Settings = field(default_factory=list)
    notes: tuple[str, ...] = ()


class Refused(ValueError):
    """A published argument has a value that cannot be carried over; the text says what is allowed."""


def _choice(key: str, table: dict[object, object]) -> Callable[[object], Translation]:
    def translate(value: object) -> Translation:
        if isinstance(value, (list, dict)) or value not in table:
            raise Refused("one of " + ", ".join(str(name) for name in table))
        return Translation([(key, table[value])])

    return translate


def _flag(key: str, when_true: object, when_false: object) -> Callable[[object], Translation]:
    def translate(value: object) -> Translation:
        if not isinstance(value, bool):
            raise Refused("True or False")
        return Translation([(key, when_true if value else when_false)])

    return translate


def _numbers(value: object) -> list[int]:
    items = value if isinstance(value, list) else str(value).split(",")
    try:
        return [int(str(item)) for item in items]
    except ValueError:
        raise Refused("-1 or numbers such as 20,21,22") from None


def _transform_layers(value: object) -> Translation:
    blocks = _numbers(value)
    return Translation([("lora.blocks", "to_window" if -1 in blocks else blocks)])


def _target_layers(value: object) -> Translation:
    if value in (None, "", -1, "-1", [-1]):
        return Translation()
    layers = _numbers(value)
    start = layers[0]
    if start < 0 or layers != list(range(start, start + len(layers))):
        raise Refused("-1 or consecutive hidden states such as 20,21,22")
    note = "the published code then puts LoRA on every block; here lora.blocks decides"
    return Translation([("objective.window_start", start), ("objective.window_size", len(layers))], (note,))


def _report_to(value: object) -> Translation:
    wanted = [value] if isinstance(value, str) else value
    if wanted in (None, [], ["none"]):
        return Translation([("output.report_to", [])], (f"accepted: {_REPORTS}",))
    if not isinstance(wanted, list) or any(name not in get_args(TrackerName) for name in wanted):
        raise Refused(f"none, or of {', '.join(get_args(TrackerName))}: {_REPORTS}")
    return Translation([("output.report_to", wanted)])


def _window(value: object) -> Translation:
    if value != "auto":
        raise Refused("auto; numbers go into window_start and window_size")
    return Translation([("objective.window_start", "auto"), ("objective.window_size", "auto")])


TRANSLATED: dict[str, Callable[[object], Translation]] = {
    "lr_scheduler_type": _choice(
        "training.schedule",
        {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"},
    ),
    "optim": _choice(
        "training.optimizer",
        {
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_8bit": "adamw_8bit",
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw": "paged_adamw",
            "paged_adamw_32bit": "paged_adamw",
            "paged_adamw_8bit": "paged_adamw_8bit",
        },
    ),
    "transform_layers": _transform_layers,
    "target_layers": _target_layers,
    "report_to": _report_to,
    # No published name: both keys of the window in one.
    "window": _window,
    "q_lora": _flag("model.quantization", "nf4", "none"),
    "bf16": _flag("model.dtype", "bfloat16", "float32"),
    "gradient_checkpointing": _flag("memory.checkpoint_blocks", "all", 0),
}

# The section that each translated name sets something in, for files that write it there.
SECTION_OF: dict[str, str] = {
    "lr_scheduler_type": "training",
    "optim": "training",
    "transform_layers": "lora",
    "target_layers": "objective",
    "report_to": "output",
    "window": "objective",
    "q_lora": "model",
    "bf16": "model",
    "gradient_checkpointing": "memory",
}

NAMES = frozenset(RENAMED).union(*RENAMED_FOR.values()) | frozenset(IGNORED) | frozenset(FIXED) | frozenset(TRANSLATED)


def renamed(objective: str) -> dict[str, str]:
    """Published names that are keys here under another name, with this objective in force."""
    return RENAMED | RENAMED_FOR.get(objective, {})


def names(objective: str) -> frozenset[str]:
    """Published names that are understood with this objective in force."""
    return frozenset(renamed(objective)) | frozenset(IGNORED) | frozenset(FIXED) | frozenset(TRANSLATED)


def bare(name: str) -> str:
    """A translated name without the section that it is written in, ``window`` of ``objective.window``; any other name
    as it is.
    """
    section, _, last = name.rpartition(".")
    return last if section and SECTION_OF.get(last) == section else name


def translate(name: str, value: object, objective: str = DEFAULT_OBJECTIVE) -> Translation:
    """What the published argument ``name`` with ``value`` sets here.

    Raises:
        Refused: the value cannot be carried over; the text says what is allowed.
        KeyError: the name is none of ``names(objective)``.
    """
    if name in renamed(objective):
        return Translation([(renamed(objective)[name], value)])
    if name in TRANSLATED:
        return TRANSLATED[name](value)
    if name in IGNORED:
        return Translation([], (f"accepted and ignored: {IGNORED[name]}",))
    values, remedy = FIXED[name]
    # `in` alone would take False for 0 and True for 1.
    if not any(value == fixed and isinstance(value, bool) == isinstance(fixed, bool) for fixed in values):
        raise Refused(remedy)
    return Translation([], ("accepted: it changes nothing here",))
