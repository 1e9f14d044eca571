"""Results that are known by their form: those that torch gives, to the storage, and none where form is not enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shape_recipes import LONGEST, recipe
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from repbend_fast.planning import peaks
from repbend_fast.planning.known_results import KnownResults
from repbend_fast.planning.planner import Planner
from repbend_fast.step.levers import Levers

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Through(TorchDispatchMode):
    """All operations through ``known``; counts those that reach torch."""

    def __init__(self, known: KnownResults) -> None:
        super().__init__()
        self.known = known

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return self.known.call(func, args, kwargs or {})


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype)


def described(result: Any, given: list[torch.Tensor]) -> list[tuple[object, ...]]:
    """Form and storage of each tensor of a result, and which of what was given has the same storage."""
    found = []
    for one in result if isinstance(result, (tuple, list)) else (result,):
        storage = one.untyped_storage()
        shared = [n for n, tensor in enumerate(given) if tensor.untyped_storage()._cdata == storage._cdata]
        form = (one.dtype, one.shape, one.stride(), one.storage_offset(), storage.nbytes())
        found.append((*form, shared, [one is tensor for tensor in given], one.device, type(one)))
    return found


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "new": lambda a, b: a @ b,
    "with numbers": lambda a, b: torch.sum(a, dim=1, keepdim=True),
    "another dtype": lambda a, b: a.to(torch.bfloat16),
    "transposed": lambda a, b: a.t(),
    "a part": lambda a, b: a[1:, 2:],
    "of a part": lambda a, b: a[1:].t()[2:].exp(),
    "in place": lambda a, b: a.add_(2),
    "split": lambda a, b: a.split(2, dim=1),
    "several": lambda a, b: torch.topk(a, 2),
    "beside a real one": lambda a, b: a + torch.ones(6),
    "rows by real numbers": lambda a, b: a[torch.tensor([2, 0])],
    "joined": lambda a, b: torch.cat([a, b.t()]),
    "attention": lambda a, b: torch.nn.functional.scaled_dot_product_attention(
        a[None, None], a[None, None], a[None, None], is_causal=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_known_result_is_that_of_torch(name: str) -> None:
    call, known = CALLS[name], KnownResults(FAKE)
    a, b = fake(4, 6), fake(6, 4)
    plain = described(call(a, b), [a, b])
    with Through(known):
        first = described(call(a, b), [a, b])
        a, b = fake(4, 6), fake(6, 4)
        again = described(call(a, b), [a, b])
    assert first == plain
    assert again == plain
    assert any(form is not None for form in known._known.values())


def test_a_known_result_asks_torch_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownResults(FAKE)
    with Through(known):
        _ = fake(4, 6) * 2
        monkeypatch.setattr(FakeTensorMode, "dispatch", None)
        monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", None)
        made = torch.ops.aten.mul.Tensor(torch._subclasses.FakeTensor(FAKE, torch.empty(4, 6, device="meta"), "cpu"), 2)
    assert made.shape == (4, 6)


def test_what_form_does_not_tell_is_left_to_torch() -> None:
    known = KnownResults(FAKE)
    a = fake(4, 6)
    with Through(known):
        for index in (torch.tensor([0]), torch.tensor([0, 1])):  # no fake tensors
            assert a[index].shape[0] == len(index)
        assert (a * 2).dtype == torch.float32
        assert (a.to(torch.int64) * 2).dtype == torch.int64
        assert (a.to(torch.int64) * 2.0).dtype == torch.float32
        assert a.sum(0).shape != a.sum(1).shape
        grown = fake(2)
        for size in (4, 4):
            grown.resize_(size)
            assert grown.shape == (size,)
    other = FakeTensorMode()
    with other:
        foreign = torch.empty(3)
    with Through(known):
        assert (foreign + 1).fake_mode is other


def test_peaks_are_those_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("objective.refusal=30", "model.dtype=bfloat16", "model.quantization=nf4")
    planner = Planner(recipe(tmp_path, *settings, layers=4), torch.device("cuda"))
    known = KnownResults(peaks.FAKE_MODE)
    streams, levers = planner._streams(2, LONGEST), Levers(checkpoint_blocks=2, packing="on")
    for stream in (streams["unsafe"], streams["refusal"]):
        found = []
        for here in (known, known, None):
            monkeypatch.setattr(peaks, "KNOWN", here)
            found.append(peaks.measure_piece(planner.model, stream, levers, planner.device, planner.meter.autocast))
        assert found[0] == found[1] == found[2], stream.name
    assert len(known._known) > 100
