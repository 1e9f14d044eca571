"""What the host takes to launch a block's work, ours beside PEFT's own LoRA layers, in turn.

    python -m benchmarks.step.host_time                          # → benchmarks/results/host_time.json

The CUDA branches run on tiny CPU tensors: products cost next to nothing there, and no Triton kernel runs, each launch
being a wait of ``--launch`` microseconds in its place. All sides have Liger's layers, LoRA on all seven matrices with
its dropout on, float32; ``no adapter`` is the block alone. Seconds are the process's own per block, the median of many
rounds; a round is one pass of every side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, write_json
from repbend_fast.config.schema import LoraConfig
from repbend_fast.environment import environment
from repbend_fast.models import attach_lora, find_decoder, prepared, surgery, trainable_parameters
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.liger import replace_modules
from repbend_fast.models.layers.lora import lora_dropout
from repbend_fast.models.layers.switches import adapter_switches, reference_model
from repbend_fast.step.levers import Levers

BLOCKS, TOKENS, WIDTH = 4, 4, 32
ROUNDS = 60
GOAL = 0.6
"""Share of PEFT's time that the adapted pass and backward may take, each."""
LORA = LoraConfig(dropout=0.05)

Passes = dict[str, Callable[[], object]]
"""Per part of a step what is timed: ``reference``, ``adapted``, ``backward``."""


@contextmanager
def cuda_branches(launch: float) -> Iterator[None]:
    """Every tensor says that it is on CUDA, and a launch of Triton's takes ``launch`` seconds and does nothing."""
    from triton.runtime import autotuner, interpreter, jit

    def run(kernel: object, *args: object, **kwargs: object) -> None:
        until = time.process_time() + launch
        while time.process_time() < until:
            pass

    with ExitStack() as patches:
        for target in (jit.JITFunction, autotuner.Autotuner, interpreter.InterpretedFunction):
            patches.enter_context(patch.object(target, "run", run))
        patches.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True), create=True))
        patches.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        # Every tensor lies on the current device, which for the CPU is -1.
        patches.enter_context(patch.object(torch.cuda, "current_device", lambda: -1))
        patches.enter_context(patch.object(torch.cuda, "device", _nothing))
        yield


@contextmanager
def _nothing(device: object) -> Iterator[None]:
    yield


def tiny_base() -> CausalLM:
    """A Llama of a few narrow blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = cast(CausalLM, AutoModelForCausalLM.from_config(shape, dtype=torch.float32))
    base.requires_grad_(False).eval()
    return base


def tiny_model() -> AdaptedLM:
    """The same with a LoRA adapter."""
    return attach_lora(tiny_base(), LORA, (BLOCKS,))


@contextmanager
def sides() -> Iterator[dict[str, Passes]]:
    """All sides, set up."""
    with ExitStack() as left:
        ours, theirs, plain = tiny_model(), tiny_model(), tiny_base()
        with patch.object(
            surgery, "use_liger", lambda model, setting, device, changes: replace_modules(model, changes)
        ):
            ready = left.enter_context(prepared(ours, Levers(), liger="auto", dropout=LORA.dropout))
        changes = Changes()
        left.callback(changes.undo)
        replace_modules(theirs, changes)
        replace_modules(plain, changes)
        theirs.train()
        keys, switches = torch.arange(TOKENS), adapter_switches(ours)

        def adapted() -> Tensor:
            with lora_dropout(ours, keys):
                return _forward(ready.model)

        def reference() -> Tensor:
            with torch.no_grad(), reference_model(ours, switches):
                return _forward(ours)

        yield {
            "ours": {"reference": reference, "adapted": adapted, "backward": _backward(adapted, ours)},
            "PEFT": {
                "adapted": lambda: _forward(theirs),
                "backward": _backward(lambda: _forward(theirs), theirs),
            },
            "no adapter": {
                "adapted": lambda: _forward(plain),
                "backward": _backward(lambda: _forward(plain), None),
            },
        }


def _forward(model: CausalLM) -> Tensor:
    hidden = torch.zeros((1, TOKENS, WIDTH), requires_grad=torch.is_grad_enabled())
    output: Tensor = find_decoder(model).body(inputs_embeds=hidden, use_cache=False)[0]
    return output


def _backward(forward: Callable[[], Tensor], model: AdaptedLM | None) -> Callable[[], object]:
    trained = [] if model is None else trainable_parameters(model)

    def passed() -> object:
        for parameter in trained:
            parameter.grad = None
        output = forward()
        start = time.process_time()
        output.backward(torch.zeros_like(output))
        return time.process_time() - start

    return passed


def measure(rounds: int, launch: float) -> dict[str, dict[str, float]]:
    """Median seconds a block, by side and part."""
    spent: dict[str, dict[str, list[float]]] = {}
    with cuda_branches(launch), sides() as found:
        for number in range(rounds + 1):
            for side, passes in found.items():
                for part, work in passes.items():
                    start = time.process_time()
                    result = work()
                    seconds = result if isinstance(result, float) else time.process_time() - start
                    if number:  # caches are filled in the first
                        spent.setdefault(side, {}).setdefault(part, []).append(seconds / BLOCKS)
    return {
        side: {part: float(f"{statistics.median(times):.3g}") for part, times in parts.items()}
        for side, parts in spent.items()
    }


def missed(found: dict[str, dict[str, float]]) -> list[str]:
    """Parts of ours that take more than their share of PEFT's time."""
    return [
        f"{part}: {found['ours'][part] / found['PEFT'][part]:.2f} of PEFT's time, the goal is {GOAL}"
        for part in ("adapted", "backward")
        if found["ours"][part] > GOAL * found["PEFT"][part]
    ]


def main() -> int:
    """Measures, records, prints; exit status 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--launch", type=float, default=8.0, help="microseconds that a launch of Triton's stands for")
    parser.add_argument("--results", type=Path, default=RESULTS / "host_time.json")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.launch * 1e-6)
    lines = missed(found)
    record = environment() | {
        "rounds": arguments.rounds,
        "launch_microseconds": arguments.launch,
        "seconds_per_block": found,
        "missed": lines,
    }
    write_json(arguments.results, record)
    for side, parts in found.items():
        print(f"{side:11}" + "".join(f"{part:>12} {1e3 * seconds:7.3f} ms" for part, seconds in parts.items()))
    for line in lines:
        print(f"missed: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
