"""What the host takes to launch a block's work: measured on the machine at hand, once, and kept (``planning.kept``).

A block costs its launches and its calls of custom ops, at rates of this machine. The rates come from a tiny decoder
block of transformers' own, forward and backward, and from a custom op around one operation; on a GPU they are the time
of queueing, not of running. How many launches and calls a block has is counted: ``BLOCK``, which a test holds to the
record of ``benchmarks.step.step_counts``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from repbend_fast.environment import hardware_name
from repbend_fast.planning import kept


@dataclass(frozen=True)
class Calls:
    """What a pass over one block asks of the host: launches of the forward and of the backward kind, and calls of
    custom ops, or of autograd functions that launch kernels themselves and cost about as much.
    """

    forward: int = 0
    backward: int = 0
    ops: int = 0


BLOCK: Mapping[str, Calls] = MappingProxyType(
    {
        "reference": Calls(forward=15),
        "adapted": Calls(forward=30, ops=11),
        "recompute": Calls(forward=30, ops=11),
        "backward": Calls(backward=48, ops=11),
    }
)
"""Per block of a Llama with LoRA on its seven matrices, 16 bits; NF4 adds ``DEQUANTISING`` to each pass."""
DEQUANTISING = 7
"""Launches that NF4 weights add to a pass over one block."""


@dataclass(frozen=True)
class HostCost:
    """Seconds of the host per launch in a forward and in a backward pass, and per call of a custom op beside its
    launches.
    """

    forward: float
    backward: float
    op: float

    def block(self, name: str, quantized: bool) -> float:
        """Of one block in the pass ``name``: ``reference``, ``adapted``, ``recompute`` or ``backward``."""
        calls = BLOCK[name]
        seconds = calls.forward * self.forward + calls.backward * self.backward + calls.ops * self.op
        return seconds + (DEQUANTISING * (self.backward if calls.backward else self.forward) if quantized else 0.0)


ASSUMED = HostCost(forward=1.5e-5, backward=8e-6, op=1.5e-5)
"""Where nothing can be measured or kept: a desktop processor of some years ago."""
DIGITS = 2
"""Significant digits that are kept: the third changes from run to run."""
LONGEST = 1e-3
"""Seconds: a rate above that is that of a machine that does something else."""
ROUNDS = 15


def host_cost(device: torch.device) -> HostCost:
    """The rates for ``device``; on a CPU, where the host is the device, the assumed ones.

    Measured once per machine and versions. Where it cannot be kept the assumed ones hold, since plans of one machine
    should agree; of two processes that measure at once both take what is kept in the end.
    """
    if device.type != "cuda" or kept.cache_folder() is None:
        return ASSUMED
    key: dict[str, kept.Json] = {
        "hardware": hardware_name(),
        **{n: kept.versions()[n] for n in ("torch", "transformers")},
    }
    known = _from_json(kept.read("host", key))
    if known is not None:
        return known
    measured = measure_host()
    if measured is None or not kept.write("host", key, asdict(measured)):
        return ASSUMED
    return _from_json(kept.read("host", key)) or ASSUMED


def _from_json(value: kept.Json) -> HostCost | None:
    if not isinstance(value, Mapping):
        return None
    rates = [value.get(name) for name in ("forward", "backward", "op")]
    numbers = [rate for rate in rates if isinstance(rate, float) and 0 < rate < LONGEST]
    return HostCost(*numbers) if len(numbers) == len(rates) else None


def measure_host() -> HostCost | None:
    """The rates of this machine, in about a second; None where a tiny model does not run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return _measure(device)
    except (ImportError, RuntimeError):
        return None


def _measure(device: torch.device) -> HostCost:
    block = _tiny_block(device)
    hidden = torch.zeros((1, 4, 16), device=device, requires_grad=True)
    with torch.no_grad():
        forward, launches = _seconds(lambda: block(hidden), device), _operations(lambda: block(hidden))
    # Tensors are made beforehand, so that the time of making them is not that of going back.
    outs = iter([block(hidden).sum() for _ in range(2 * ROUNDS + 2)])
    backward_launches = _operations(lambda: next(outs).backward())
    backward = _seconds(lambda: next(outs).backward(), device)
    with torch.no_grad():
        factor = torch.ones((), device=device)
        around = _seconds(lambda: torch.ops.repbend_kernels.scale_([hidden], factor), device)
        op = around - _seconds(lambda: hidden.mul_(factor), device)
    return HostCost(*(_rounded(s) for s in (forward / launches, backward / backward_launches, max(op, 1e-7))))


def _tiny_block(device: torch.device) -> Callable[[Tensor], Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(device)
    positions = torch.arange(4, device=device)[None]
    cosines = LlamaRotaryEmbedding(config).to(device)(torch.zeros((1, 4, 16), device=device), positions)

    def block(hidden: Tensor) -> Tensor:
        result: Tensor = layer(hidden, position_embeddings=cosines)
        return result

    return block


@cache
def _views() -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in ("empty", "empty_like", "_unsafe_view", "detach"))


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.count += not (func.is_view or func._schema.name in _views())
        return func(*args, **(kwargs or {}))


def _operations(work: Callable[[], object]) -> int:
    with _Counter() as counter:
        work()
    return max(1, counter.count)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of the host's seconds for a call, the device's queue being empty before it."""
    work()
    spent = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS - 1}e}")
