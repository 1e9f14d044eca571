"""``training.autocast``: what ``auto`` comes to on which device."""

from __future__ import annotations

import pytest
import torch

from repbend_fast.config import Config, load_config
from repbend_fast.models.autocast import autocast_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _config(setting: str, dtype: str = "float32") -> Config:
    return load_config("demo", [f"training.autocast={setting}", f"model.dtype={dtype}"])


def _processor(monkeypatch: pytest.MonkeyPatch, *, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool) -> None:
    _processor(monkeypatch, avx512=avx512, amx=amx)
    assert autocast_dtype(_config("auto"), CPU) == (torch.bfloat16 if avx512 or amx else None)


@pytest.mark.parametrize(
    ("there", "native", "dtype"), [(True, True, torch.bfloat16), (True, False, None), (False, False, torch.bfloat16)]
)
def test_auto_follows_the_card_or_plans_for_one(
    monkeypatch: pytest.MonkeyPatch, there: bool, native: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert autocast_dtype(_config("auto"), CUDA) == dtype


def test_auto_leaves_sixteen_bit_weights_and_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, avx512=True, amx=True)
    assert autocast_dtype(_config("auto", "bfloat16"), CPU) is None
    assert autocast_dtype(_config("auto"), torch.device("mps")) is None


def test_what_is_said_is_done_whatever_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, avx512=False, amx=False)
    assert autocast_dtype(_config("bfloat16"), CPU) == torch.bfloat16
    _processor(monkeypatch, avx512=True, amx=True)
    assert autocast_dtype(_config("none"), CPU) is None
