"""Running out of memory inside a piece: what counts as that, how the piece is dropped, and which lever gives next."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from repbend_kernels.blocks import default_chunk_rows
from torch import nn

from repbend_fast.errors import UserError
from repbend_fast.step.levers import Levers

T = TypeVar("T")

# torch raises its OutOfMemoryError for its own CUDA allocator only; these are other allocators' words.
WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "[CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # Backward's own thread makes its handle when the card is at its fullest.
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)


@dataclass(frozen=True)
class Load:
    """What a batch held: its stream's name, or its ``streams``' names, its sequences, its positions with padding, and
    the head's rows and vocabulary.
    """

    stream: str
    sequences: int
    positions: int
    head_rows: int = 0
    vocabulary: int = 0
    streams: int = 1

    def __str__(self) -> str:
        streams = "stream" if self.streams == 1 else "streams"
        sequences = "sequence" if self.sequences == 1 else "sequences"
        return f"{streams} {self.stream}, {self.sequences} {sequences} of {self.positions} tokens"


@dataclass(frozen=True)
class OutOfMemory:
    """Stands in for the result of work that ran out of memory; nothing of the work is referenced any more."""

    reason: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation on the device or the host failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def attempt(work: Callable[[], T], device: torch.device) -> T | OutOfMemory:
    """Call ``work``; when memory runs out, free all that it held and say so instead of raising."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The traceback's frames hold the piece's tensors, and those the graph.
        traceback.clear_frames(error.__traceback__)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(reason)


def optimizer_out_of_memory(step: int, name: str) -> UserError:
    """What to tell a user whose optimizer's states did not fit."""
    smaller = {"adamw": "adamw_8bit, or on CUDA paged_adamw_8bit", "adamw_8bit": "paged_adamw_8bit, on CUDA"}.get(name)
    remedy = f"set training.optimizer={smaller}," if smaller else "lower lora.r"
    what = f"out of memory in the optimizer (training.optimizer={name})"
    return UserError(f"step {step}: {what}; {remedy} or set memory.budget, and start again")


@contextmanager
def fresh_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Collect gradients apart from the accumulated ones and add them at the end: after an error the accumulated ones
    are untouched.
    """
    earlier = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, gradient in zip(parameters, earlier):
            p.grad = gradient
        raise
    both = [
        (gradient, p.grad) for p, gradient in zip(parameters, earlier) if gradient is not None and p.grad is not None
    ]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    for p, gradient in zip(parameters, earlier):
        if gradient is not None:
            p.grad = gradient


def retreat(levers: Levers, load: Load, num_blocks: int, device: torch.device) -> tuple[Levers, str]:
    """The levers to go on with after a piece of this load did not fit, and what changed in words.

    Streams that shared a pass are run apart. Else half the piece; for a single sequence all blocks recomputed, then
    half the head's chunk, then checkpoints in host memory.

    Raises:
        UserError: nothing is left to give.
    """
    if load.streams > 1:
        return replace(levers, merge_streams="off"), "one stream after the other"
    if load.sequences > 1:
        # A failure inside of another's work may have made pieces smaller than half of this one.
        size = max(1, min(load.positions // 2, levers.piece_size(load.stream) or load.positions))
        return replace(
            levers, piece_tokens={**levers.piece_tokens, load.stream: size}
        ), f"pieces of at most {size} tokens"
    if levers.checkpoint_blocks < num_blocks:
        return replace(levers, checkpoint_blocks=num_blocks), "all blocks recomputed in backward"
    if load.head_rows:
        rows = levers.kl_chunk_rows or default_chunk_rows(load.head_rows, load.vocabulary, device)
        if min(rows, load.head_rows) > 1:
            half = min(rows, load.head_rows) // 2
            return replace(levers, kl_chunk_rows=half), f"head losses in chunks of {half} rows"
    if device.type == "cuda" and not levers.offload_checkpoints:
        return replace(levers, offload_checkpoints=True), "checkpoints in host memory"
    raise UserError(
        f"out of memory ({load}) with every lever at its end; lower data.max_prompt_tokens and data.max_answer_tokens, "
        "set "
        "model.quantization=nf4 or memory.offload_embedding=true, or choose a smaller model; memory.budget says "
        "beforehand what fits"
    )
