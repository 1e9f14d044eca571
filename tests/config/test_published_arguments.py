"""The published command line carries over."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from repbend_fast.config import Config, load_config
from repbend_fast.config.keys import child, locate
from repbend_fast.config.published import FIXED, IGNORED, NAMES, RENAMED
from repbend_fast.errors import UserError

COMMAND_LINE = shlex.split(
    "--model_name_or_path M --dataset_path allenai/wildguardmix --dataset_split wildguardtrain --target_layers -1"
    " --target_layer_start_idx 20 --layers_window_size 11 --transform_layers -1 --loss_alpha 0.5 --loss_beta 0.5 "
    "--loss_gamma 0.1"
    " --loss_epsilon 0.3 --loss_eta 0.0 --loss_mode response_all --alpha_mode all --max_steps 450 --lora_r 16 "
    "--lora_alpha 16"
    " --lora_dropout 0.05 --output_dir O --overwrite_output_dir --num_train_epochs 1 --bf16 True --tf32 True"
    " --per_device_train_batch_size 4 --per_device_eval_batch_size 32 --gradient_accumulation_steps 4 --do_eval"
    " --evaluation_strategy steps --eval_steps 1000 --save_total_limit 0 --learning_rate 1e-5 --weight_decay 0."
    " --lr_scheduler_type constant --logging_strategy steps --logging_steps 10 --max_seq_length 4096 --q_lora False"
    " --gradient_checkpointing True --report_to none --is_online False"
)


def load(
    *overrides: str, recipe: str = "llama-3-8b-instruct", overlays: str | tuple[str, ...] = ()
) -> tuple[Config, list[str]]:
    notes: list[str] = []
    return load_config(recipe, overrides, overlays=overlays, note=notes.append), notes


def test_the_published_command_line_gives_the_published_run() -> None:
    c, notes = load(*COMMAND_LINE, recipe="mistral-7b-instruct-v0.2")
    expected, _ = load("model.name=M", "output.folder=O", "log_every=10")
    assert c == expected
    noted = IGNORED.keys() | FIXED.keys() | {"report_to"}
    ignored = [token[2:] for token in COMMAND_LINE if token.startswith("--") and token[2:] in noted]
    assert len(ignored) == 12
    assert [note.split("=")[0] for note in notes] == [f"--{name}" for name in ignored]


def test_the_published_command_line_overrides_a_recipe_that_differs() -> None:
    c, _ = load(
        *COMMAND_LINE, "lora.dtype=bfloat16", "validation.every=0", recipe="llama-3-8b-instruct", overlays="qlora"
    )
    assert (c.model.quantization, c.memory.checkpoint_blocks, c.lora.dtype, c.validation.every) == (
        "none",
        "all",
        "bfloat16",
        0,
    )


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("alpha=0.7", "objective", "safe", 0.7),
        ("loss_alpha=0.7", "objective", "safe", 0.7),
        ("beta=0.7", "objective", "unsafe", 0.7),
        ("gamma=0.7", "objective", "cosine", 0.7),
        ("epsilon=0.7", "objective", "kl", 0.7),
        ("eta=0.7", "objective", "pair", 0.7),
        ("target_layer_start_idx=5", "objective", "window_start", 5),
        ("layers_window_size=3", "objective", "window_size", 3),
        ("alpha_mode=target", "objective", "alpha_mode", "target"),
        ("loss_mode=request_last", "objective", "loss_mode", "prompt_last"),
        ("loss_mode=request_all", "objective", "loss_mode", "prompt_all"),
        ("objective.loss_mode=request_response", "objective", "loss_mode", "prompt_response"),
        ("paired_repr_length=4", "objective", "pair_positions", 4),
        ("max_step=9", "training", "steps", 9),
        ("transform_layers=5,6,7", "lora", "blocks", [5, 6, 7]),
        ("transform_layers=6", "lora", "blocks", [6]),
        ("transform_layers=-1", "lora", "blocks", "to_window"),
        ("lora_r=4", "lora", "r", 4),
        ("lora_alpha=4", "lora", "alpha", 4),
        ("q_lora=True", "model", "quantization", "nf4"),
        ("bf16=False", "model", "dtype", "float32"),
        ("adapter_name_or_path=A/b", "model", "adapter", "A/b"),
        ("gradient_checkpointing=False", "memory", "checkpoint_blocks", 0),
        ("lr_scheduler_type=cosine", "training", "schedule", "cosine"),
        ("optim=adamw_bnb_8bit", "training", "optimizer", "adamw_8bit"),
        ("max_grad_norm=0.3", "training", "clip_norm", 0.3),
        ("--logging_steps=10", "training", "log_every", 10),
    ],
)
def test_alias(override: str, section: str, key: str, value: Any) -> None:
    c, _ = load(override)
    assert getattr(getattr(c, section), key) == value


def test_explicit_target_layers_become_a_window_with_a_note() -> None:
    c, notes = load("--target_layers", "10,11,12")
    assert c.objective.window == (10, 11, 12)
    assert len(notes) == 1
    assert "lora.blocks" in notes[0]


def test_dataset_path_and_split_replace_the_wildguardmix_source() -> None:
    c, _ = load("--dataset_path", "mirror/wildguardmix", "--dataset_split", "other")
    first = c.data.sources[0]
    assert (first.path, first.subset, first.split, len(c.data.sources)) == ("mirror/wildguardmix", "other", "train", 3)
    with pytest.raises(
        UserError, match=r"--dataset_path: data\.sources has no single item wildguardmix; its items are 0 \(demo\)"
    ):
        load("--dataset_path", "x/y", recipe="demo")


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("is_online=True", "False"),
        ("full_layers=False", "True"),
        ("report_to=mlflow", "none"),
        ("target_layers=10,12", "consecutive"),
        ("target_layers=-3,-2", "consecutive"),
        ("transform_layers=a", "20,21,22"),
        ("lr_scheduler_type=polynomial", "constant_with_warmup"),
        ("q_lora=maybe", "True or False"),
        ("q_lora=1", "True or False"),
        ("adv_string=Sure", "empty"),
    ],
)
def test_values_that_would_change_the_meaning_are_refused(override: str, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        load(override)
    assert str(error.value).startswith(override.split("=")[0])
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)


def test_every_renamed_argument_leads_to_a_key_of_the_schema() -> None:
    for name, target in RENAMED.items():
        path = target.replace("wildguardmix", "0").split(".")
        place = locate(())
        for part in path:
            following = child(place, int(part) if part.isdigit() else part)
            assert following is not None, (name, target)
            place = following
    assert len(NAMES) > 50
