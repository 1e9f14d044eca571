"""How long the answers to the demo's validation prompts take, as the project writes them and by transformers' own
``generate`` on the same batches.

    python -m benchmarks.evaluation.generation_time [--adapter RUN/adapter] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from benchmarks.harness import write_json
from repbend_fast.config import load_config
from repbend_fast.data.prompts import Prompt, PromptsConfig, load_prompts
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.environment import environment
from repbend_fast.evaluation.decoding import padded
from repbend_fast.evaluation.generate import generate_measured, greedy_generation
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.load import load_model, load_tokenizer

BATCH, NEW = 128, 64


def by_the_library(model: CausalLM, encoder: ChatEncoder, prompts: Sequence[Prompt]) -> int:
    """Tokens of the answers up to their ends, by ``generate`` on left-padded batches of similar length."""
    encoded = sorted((encoder.prompt_ids(p.conversation(), "", p.tools) for p in prompts), key=len)
    tokens = 0
    with greedy_generation(model, encoder.tokenizer, NEW):
        ends = model.generation_config.eos_token_id
        for start in range(0, len(encoded), BATCH):
            ids, mask = padded(encoded[start : start + BATCH], model.generation_config.pad_token_id)
            rows = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
            tokens += sum(next((i for i, token in enumerate(row) if token in ends), NEW) for row in rows)
    return tokens


def by_ours(model: CausalLM, encoder: ChatEncoder, prompts: Sequence[Prompt]) -> int:
    found = generate_measured(model, encoder, prompts, max_new_tokens=NEW, batch_size=BATCH)
    return sum(answer.tokens for answer in found)


SIDES: dict[str, Callable[[CausalLM, ChatEncoder, Sequence[Prompt]], int]] = {
    "transformers": by_the_library,
    "ours": by_ours,
}


def demo_model(adapter: Path | None) -> CausalLM:
    """The demo's model, with the adapter in its layers and without a wrapper, which generation goes past."""
    base = load_model(load_config("demo").model)
    if adapter is not None:
        from peft import PeftModel

        PeftModel.from_pretrained(cast(PreTrainedModel, base), str(adapter))
    return base


def measure(adapter: Path | None, prompts: int | None, rounds: int) -> dict[str, object]:
    """Seconds of both sides in turn, medians and all, with the tokens that they wrote."""
    config = load_config("demo")
    model, tokenizer = demo_model(adapter), load_tokenizer(config.model)
    encoder = ChatEncoder(
        tokenizer, config.data.max_prompt_tokens, config.data.max_answer_tokens, config.data.chat_template_kwargs
    )
    asked = load_prompts(PromptsConfig(path="demo", split="validation"))[:prompts]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    tokens: dict[str, int] = {}
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(rounds):
            for side, answer in SIDES.items():
                start = time.perf_counter()
                tokens[side] = answer(model, encoder, asked)
                seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    return {
        "adapter": "none" if adapter is None else "of a demo run",
        "prompts": len(asked),
        "new_tokens": NEW,
        "batch_size": BATCH,
        "autocast": "bfloat16",
        "seconds": seconds,
        "median_seconds": medians,
        "tokens": tokens,
        "speedup": medians["transformers"] / medians["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, help="the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    adapters = [None] if given.adapter is None else [None, given.adapter]
    found = [measure(adapter, given.prompts, given.rounds) for adapter in adapters]
    for row in found:
        print(f"adapter {row['adapter']}: {row['speedup']:.2f} times as fast")
    if given.out:
        record = environment() | {
            "what": "answers to the demo's validation prompts, sides in turn",
            "rows": found,
        }
        write_json(given.out, record)


if __name__ == "__main__":
    main()
