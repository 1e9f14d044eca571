"""How much faster batches of prompts are answered than one prompt after the other, on a small random model.

    python -m benchmarks.evaluation.generation_throughput [--batch-size 8] [--out FILE]

Both ways generate the same number of tokens, and the same answers in float32: a random model has no end, so every
answer is as long as the budget.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import write_json
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.environment import environment
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.models.causal import CausalLM

WORDS = "how does one make a lamp of fog and sell it at the market before the moon is up again".split()


class Letters:
    """A tokenizer of bytes, without an end."""

    pad_token_id = 0
    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class LetterEncoder:
    tokenizer = cast(Tokenizer, Letters())

    def prompt_ids(self, messages: Sequence[Message], prefill: str = "", tools: str = "") -> list[int]:
        return list((messages[-1].content + prefill).encode())


def model(width: int, blocks: int) -> LlamaForCausalLM:
    """A random Llama whose answers depend on the prompt."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(shape).eval()


def measure(batch_size: int, prompts: int, tokens: int, rounds: int, width: int, blocks: int) -> dict[str, object]:
    """Seconds of both ways, the median of ``rounds`` that alternate, and whether the answers are the same."""
    subject = cast(CausalLM, model(width, blocks))
    texts = [" ".join(WORDS[: 3 + (5 * i) % (len(WORDS) - 2)]) for i in range(prompts)]
    asked = [Prompt("attack", text) for text in texts]
    seconds: dict[int, list[float]] = {1: [], batch_size: []}
    answers: dict[int, list[str]] = {}
    for size in seconds:  # warm up
        generate_answers(subject, LetterEncoder(), asked[:size], max_new_tokens=2, batch_size=size)
    for _ in range(rounds):
        for size, found in seconds.items():
            start = time.perf_counter()
            answers[size] = generate_answers(subject, LetterEncoder(), asked, max_new_tokens=tokens, batch_size=size)
            found.append(time.perf_counter() - start)
    one, many = (statistics.median(found) for found in seconds.values())
    return {
        "model": {"parameters": sum(p.numel() for p in subject.parameters()), "width": width, "blocks": blocks},
        "dtype": "float32",
        "prompts": prompts,
        "new_tokens": tokens,
        "batch_size": batch_size,
        "rounds": rounds,
        "seconds_one_by_one": one,
        "seconds_batched": many,
        "tokens_per_second": {"one_by_one": prompts * tokens / one, "batched": prompts * tokens / many},
        "speedup": one / many,
        "same_answers": answers[1] == answers[batch_size],
        "different_answers": len(set(answers[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = measure(given.batch_size, given.prompts, given.tokens, given.rounds, given.width, given.blocks)
    print(f"{found['speedup']:.2f} x at batch {given.batch_size}, same answers: {found['same_answers']}")
    if given.out:
        record = {"environment": environment(), **found}
        write_json(given.out, record)


if __name__ == "__main__":
    main()
