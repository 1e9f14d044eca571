"""Sizes as users write them, and what stands during the whole of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shape_recipes import recipe

from repbend_fast.errors import UserError
from repbend_fast.models import trainable_parameters
from repbend_fast.planning import budget
from repbend_fast.planning.budget import Standing, _optimizer_bytes, budget_bytes, parse_budget, standing, taken
from repbend_fast.planning.cards import BARE_CONTEXT, CARDS, CUDA_CONTEXT, find_card
from repbend_fast.planning.shapes import shape_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("7.5GiB", 7.5 * 2**30),
        ("500 MB", 5 * 10**8),
        ("64mib", 64 * 2**20),
        ("123456", 123456),
        ("auto", None),
    ],
)
def test_sizes(text: str, size: float | None) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["much", "8 TB", "-1GB", "0GB", "8,5GB", ""])
def test_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"memory\.budget=.*8GB"):
        parse_budget(text)


def test_standing_counts_two_moments_of_float32_and_one_byte_each_of_8bit(tmp_path: Path) -> None:
    config = recipe(tmp_path, "training.optimizer=adamw_8bit")
    model = shape_model(config.model, config.lora, config.objective.window)
    parts = standing(model, config, CPU)
    numbers = [p.numel() for p in trainable_parameters(model)]
    assert parts.adapter == parts.gradients == 4 * sum(numbers)
    small = sum(n for n in numbers if n < 4096)
    large = sum(numbers) - small
    assert parts.optimizer == pytest.approx(8 * small + (2 + 8 / 256) * large, rel=0.02)
    config.training.optimizer = "adamw"
    assert standing(model, config, CPU).optimizer == 8 * sum(numbers)


def test_paged_moments_of_small_parameters_and_all_scales_stay_on_the_device() -> None:
    """bitsandbytes pages parameters of at least 100 000 elements (``Optimizer8bit.get_state_buffer``), and
    no scales.
    """
    sizes = [1000, 50_000, 99_999, 100_000, 1_000_000]
    assert _optimizer_bytes(sizes, 4 * sum(sizes), "paged_adamw") == 8 * (1000 + 50_000 + 99_999)
    scales = 8 * sum(-(n // -256) for n in sizes[1:])
    assert _optimizer_bytes(sizes, 4 * sum(sizes), "paged_adamw_8bit") == 8 * 1000 + 2 * (50_000 + 99_999) + scales
    assert _optimizer_bytes(sizes, 4 * sum(sizes), "adamw_8bit") == 8 * 1000 + 2 * sum(sizes[1:]) + scales


def test_auto_counts_the_context_once(monkeypatch) -> None:
    """What is free on a GPU is so after the context was made, and every plan has the context in it."""
    monkeypatch.setattr(budget, "free_memory", lambda device: 7 * 10**9)
    assert budget_bytes("auto", CUDA) == 7 * 10**9 + BARE_CONTEXT
    assert BARE_CONTEXT < CUDA_CONTEXT
    assert budget_bytes("auto", CPU) == 7 * 10**9
    assert budget_bytes("8GB", CUDA) == 8 * 10**9


def test_taken_has_a_reserve_on_cuda_only() -> None:
    stays = Standing(weights=10**9, adapter=0, gradients=0, optimizer=0, other=0, step=5 * 10**8)
    assert taken(stays, 2 * 10**9, CPU) == 3 * 10**9
    assert taken(stays, 2 * 10**9, CUDA) == 3.1 * 10**9
    assert taken(stays, 10**8, CPU) == 1.5 * 10**9  # the optimizer's step is the peak then


@pytest.mark.parametrize(
    ("name", "key"), [("4090", "4090"), ("RTX 4070 Ti SUPER", "4070tis"), ("rtx3060", "3060"), ("A100", "a100")]
)
def test_cards_by_name(name: str, key: str) -> None:
    assert find_card(name) is CARDS[key]


def test_unknown_card() -> None:
    with pytest.raises(UserError, match=r"--card 9999.*4060"):
        find_card("9999")
