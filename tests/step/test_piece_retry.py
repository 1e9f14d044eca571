"""Memory runs out at each phase of a piece: gradient and metrics are those of an undisturbed step, dropout on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from tiny_models import (
    BLOCKS,
    WITHOUT_DROPOUT,
    adapted_model,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    runner_on,
)
from torch import Tensor

from repbend_fast.errors import UserError
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamResult, adapted, reference
from repbend_fast.step.levers import EVERY_STREAM, Levers
from repbend_fast.step.retreat import Load, OutOfMemory, attempt, fresh_gradients, is_out_of_memory, retreat
from repbend_fast.step.terms import distance, head_kl, pairwise

CPU = torch.device("cpu")
TOLERANCE = 2e-5
CONFIG = objective_config(pair=0.4)
WHOLE, SPLIT = Levers(packing="on"), Levers({EVERY_STREAM: 30, "unsafe": 12}, packing="on")
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"
    ),
    "host": lambda: MemoryError(),
}
# (module and name to break, on which of its calls)
PHASES = {
    "pairwise pass": (pairwise, "run_decoder", 1),
    "second piece of the pairwise pass": (pairwise, "run_decoder", 2),
    "reference": (reference, "run_decoder", 1),
    "reference of the other answers": (distance, "run_decoder", 1),
    "adapted pass": (adapted, "run_decoder", 1),
    "adapted pass of a later piece": (adapted, "run_decoder", 3),
    "tap of a later layer": (distance, "bend_tap", 3),
    "last prompt token": (pairwise, "tap_rows", 2),
    "head loss": (head_kl, "linear_kl_div", 1),
    "backward of a later stream": (torch.Tensor, "backward", 3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted_model(lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3}))


class Step:
    """One step of all streams, after another one whose gradient is already there."""

    def __init__(self, model: Any, levers: Levers) -> None:
        self.model = model
        self.runner = runner_on(model, levers)
        self.said: list[str] = []
        self.runner.on_out_of_memory = lambda line, words: self.said.append(line)
        self.results: dict[str, StreamResult] = {}

    def run(self, seed: int = 9) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.runner.parameters:
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
        for stream in build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0):
            self.results[stream.name] = self.runner.backward(stream, dropout_seed=seed)
        return gradients(self.model)


@pytest.fixture(scope="module")
def undisturbed(model: Any) -> tuple[dict[str, StreamResult], dict[str, Tensor]]:
    step = Step(model, WHOLE)
    found = step.run()
    assert not step.said
    return step.results, found


def _assert_undisturbed(step: Step, found: dict[str, Tensor], undisturbed: Any) -> None:
    results, expected = undisturbed
    for name, result in results.items():
        got = step.results[name]
        assert got.tokens == result.tokens
        for term, value in result.terms.items():
            assert_matches(got.terms[term], value, tolerance=TOLERANCE, name=term)
    assert_matches(flat(found), flat(expected), tolerance=TOLERANCE, name="gradient")


def breaking(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int, error: Callable[[], Exception]
) -> list[int]:
    """The ``nth`` call of ``owner.name`` raises; returns the list of calls met."""
    real, calls = getattr(owner, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise error()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("levers", [WHOLE, SPLIT], ids=["one piece", "split"])
@pytest.mark.parametrize("phase", PHASES)
def test_each_phase(model, undisturbed, monkeypatch, phase, levers) -> None:
    if levers is WHOLE and "pairwise" in phase:
        pytest.skip("a stream in one piece has no pairwise pass")
    owner, name, nth = PHASES[phase]
    breaking(monkeypatch, owner, name, nth, ERRORS["cuda"])
    step = Step(model, levers)
    _assert_undisturbed(step, step.run(), undisturbed)
    assert len(step.said) == 1
    assert step.said[0].startswith("out of memory (stream ")
    assert step.runner.levers != levers
    _assert_undisturbed(step, step.run(), undisturbed)
    assert len(step.said) == 1, "the new levers stay"


@pytest.mark.parametrize("nth", [1, 5, 40])
@pytest.mark.parametrize("blocks", [0, BLOCKS], ids=["kept", "recomputed"])
def test_in_the_midst_of_backward(model, undisturbed, nth, blocks) -> None:
    """Some parameters have their gradient of the piece already, and lose it again."""
    calls: list[int] = []

    def hook(gradient: Tensor) -> None:
        calls.append(1)
        if len(calls) == nth:
            raise ERRORS["cuda"]()

    step = Step(model, Levers(SPLIT.piece_tokens, blocks, packing="on"))
    hooks = [parameter.register_hook(hook) for parameter in step.runner.parameters]
    try:
        _assert_undisturbed(step, step.run(), undisturbed)
    finally:
        for handle in hooks:
            handle.remove()
    assert len(step.said) == 1


@pytest.mark.parametrize("error", ERRORS)
def test_every_allocator(model, undisturbed, monkeypatch, error) -> None:
    breaking(monkeypatch, distance, "bend_tap", 2, ERRORS[error])
    step = Step(model, WHOLE)
    _assert_undisturbed(step, step.run(), undisturbed)
    assert len(step.said) == 1


def test_again_and_again_until_it_fits(model, undisturbed, monkeypatch) -> None:
    """A device that holds 14 positions in the adapted pass, which is the longest sequence, and 9 without
    recomputation.
    """
    real, sizes = adapted.run_decoder, []

    def small(decoder: Any, input_ids: Tensor, **kwargs: Any) -> None:
        size = input_ids.numel()
        if size > 14 or (size > 9 and kwargs["checkpoint_blocks"] < BLOCKS):
            raise ERRORS["cuda"]()
        sizes.append(size)
        real(decoder, input_ids, **kwargs)

    monkeypatch.setattr(adapted, "run_decoder", small)
    step = Step(model, WHOLE)
    _assert_undisturbed(step, step.run(), undisturbed)
    assert max(sizes) == 14
    assert step.runner.levers.checkpoint_blocks == BLOCKS
    assert set(step.runner.levers.piece_tokens) == {"safe", "unsafe", "retain"}
    assert len(step.said) > 3


def test_a_single_sequence_goes_through_the_other_levers_and_then_says_what_to_do(model, monkeypatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise ERRORS["cuda"]()

    monkeypatch.setattr(head_kl, "linear_kl_div", never)
    step = Step(model, WHOLE)
    with pytest.raises(UserError) as caught:
        step.run()
    text = str(caught.value)
    assert text.startswith("out of memory (stream retain, 1 sequence of 12 tokens) with every lever at its end;")
    assert "\n" not in text
    for remedy in ("data.max_prompt_tokens", "data.max_answer_tokens", "model.quantization=nf4", "memory.budget"):
        assert remedy in text
    changes = [line.split("): ")[1].removesuffix(" from here on") for line in step.said]
    assert changes == [
        "pieces of at most 9 tokens",
        "all blocks recomputed in backward",
        "head losses in chunks of 6 rows",
        "head losses in chunks of 3 rows",
        "head losses in chunks of 1 rows",
    ]
    monkeypatch.undo()
    for stream in build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0):
        step.runner.backward(stream, dropout_seed=0)


def test_validation_survives_too(model, monkeypatch) -> None:
    stream = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)[1]
    expected = runner_on(model, WHOLE).measure(stream)
    breaking(monkeypatch, distance, "bend_tap", 2, ERRORS["cuda"])
    runner = runner_on(model, WHOLE)
    found = runner.measure(stream)
    for term, value in expected.terms.items():
        assert_matches(found.terms[term], value, tolerance=TOLERANCE, name=term)
    assert runner.levers != WHOLE


def test_another_error_is_not_swallowed_and_leaves_the_gradient_alone(model, monkeypatch) -> None:
    step = Step(model, WHOLE)
    model.zero_grad(set_to_none=True)
    streams = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)
    step.runner.backward(streams[0], dropout_seed=0)
    before = gradients(model)
    handle = step.runner.parameters[3].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.runner.backward(streams[1], dropout_seed=0)
    handle.remove()
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    breaking(monkeypatch, distance, "bend_tap", 2, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step.runner.backward(streams[1], dropout_seed=0)
    assert not step.said


def test_all_that_the_piece_held_is_free_before_the_next_attempt(model, monkeypatch) -> None:
    real, held = distance.bend_tap, []

    def full(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(hidden, *args, **kwargs)
        if len(held) < 3:
            held.append(weakref.ref(result[0]))
        if len(held) == 3:
            held.append(lambda: None)
            raise ERRORS["cuda"]()
        return result

    monkeypatch.setattr(distance, "bend_tap", full)
    step = Step(model, WHOLE)
    alive: list[int] = []
    step.runner.on_out_of_memory = lambda line, words: alive.append(sum(reference() is not None for reference in held))
    step.run()
    assert len(held) == 4
    assert alive == [0]


def test_what_a_first_pass_gave_up_holds_for_its_own_piece(model, monkeypatch) -> None:
    """A single sequence's prompt does not fit, so that every block is recomputed: in the adapted pass that follows as
    well.
    """
    breaking(monkeypatch, pairwise, "run_decoder", 1, ERRORS["cuda"])
    real, seen = adapted.run_decoder, []
    monkeypatch.setattr(
        adapted,
        "run_decoder",
        lambda *args, **kwargs: (seen.append(kwargs["checkpoint_blocks"]), real(*args, **kwargs))[1],
    )
    step = Step(model, Levers({EVERY_STREAM: 1}, packing="on"))
    (unsafe,) = (s for s in build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0) if s.name == "unsafe")
    step.runner.backward(unsafe, dropout_seed=9)
    assert seen == [BLOCKS] * len(unsafe.sequences)


def test_the_comparison_sees_a_piece_counted_twice(model, undisturbed) -> None:
    step = Step(model, WHOLE)
    stream = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)[1]
    step.run()
    step.runner.backward(stream, 0.01, dropout_seed=9)
    assert relative_l2(flat(gradients(model)), flat(undisturbed[1])) > 10 * TOLERANCE


LADDER = [
    (Levers(), Load("safe", 4, 100), CPU, Levers({"safe": 50}), "pieces of at most 50 tokens"),
    (
        Levers({"*": 80, "safe": 60}),
        Load("safe", 2, 41),
        CPU,
        Levers({"*": 80, "safe": 20}),
        "pieces of at most 20 tokens",
    ),
    (
        Levers({"safe": 9}, merge_streams="on"),
        Load("safe and retain", 1, 40, streams=2),
        CPU,
        Levers({"safe": 9}),
        "one stream after the other",
    ),
    (Levers({"safe": 9}, 1), Load("safe", 1, 40), CPU, Levers({"safe": 9}, 4), "all blocks recomputed in backward"),
    (
        Levers({}, 4),
        Load("retain", 1, 40, 40, 50),
        CPU,
        Levers({}, 4, kl_chunk_rows=20),
        "head losses in chunks of 20 rows",
    ),
    (
        Levers({}, 4, kl_chunk_rows=7),
        Load("retain", 1, 40, 40, 50),
        CPU,
        Levers({}, 4, kl_chunk_rows=3),
        "head losses in chunks of 3 rows",
    ),
    (Levers({}, 4), Load("safe", 1, 40), torch.device("cuda"), Levers({}, 4, True), "checkpoints in host memory"),
    (
        Levers({}, 4, kl_chunk_rows=1),
        Load("retain", 1, 9, 9, 5),
        torch.device("cuda"),
        Levers({}, 4, True, kl_chunk_rows=1),
        "checkpoints in",
    ),
]


@pytest.mark.parametrize(("levers", "load", "device", "expected", "words"), LADDER, ids=range(len(LADDER)))
def test_the_next_lever(levers, load, device, expected, words) -> None:
    found, said = retreat(levers, load, 4, device)
    assert found == expected
    assert said.startswith(words)


def test_nothing_left() -> None:
    for device, levers in ((CPU, Levers({}, 4)), (torch.device("cuda"), Levers({}, 4, True))):
        with pytest.raises(UserError, match=r"out of memory \(stream safe, 1 sequence of 40 tokens\)"):
            retreat(levers, Load("safe", 1, 40), 4, device)


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(error()) for error in ERRORS.values())
    for words in (
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "driver error: out of memory",
    ):
        assert is_out_of_memory(RuntimeError(f"CUDA {words}"))
    assert not is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`")
    )
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    result = attempt(lambda: 1 // 0 if False else 7, CPU)
    assert result == 7

    def fails() -> int:
        raise ERRORS["cpu"]()

    failure = attempt(fails, CPU)
    assert isinstance(failure, OutOfMemory)
    assert "you tried to allocate 8 bytes" in failure.reason


def test_fresh_gradients_are_added_to_the_earlier_ones() -> None:
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.ones(2)
    earlier = first.grad
    with fresh_gradients([first, second, third]):
        assert first.grad is None
        first.grad, second.grad = torch.full((2,), 2.0), torch.full((2,), 5.0)
    assert first.grad is earlier
    assert first.grad.tolist() == [3, 3]
    assert second.grad is not None
    assert second.grad.tolist() == [5, 5]
    assert third.grad is None
