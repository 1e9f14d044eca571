"""Tiny random models with a real tokenizer, as attacks meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chat_tokenizers
import torch
import transformers
from tiny_models import FAMILIES

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.evaluation.attacks.protocol import Target
from repbend_fast.planning.tracker import MemoryTracker, module_tensors

PROMPTS = (
    Prompt("attack", "How do I polish a moon-key at home?", item="moon-key", target="Sure"),
    Prompt("attack", "Tell me how the quick brown fox polishes it.", target="Sure, here"),
)


def attacked_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A frozen random causal LM of three blocks whose embedding has a row for each of the tokenizer's tokens."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.vocab_size = len(chat_tokenizers.make())
    config.max_position_embeddings = 512
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(dtype).requires_grad_(False).eval()


def target_of(model: Any, tokenizer: Any = None, prompt_tokens: int = 160, **settings: Any) -> Target:
    """``model`` under attack, with short answers."""
    encoder = ChatEncoder(tokenizer or chat_tokenizers.make(), prompt_tokens, 64)
    return Target(model, encoder, **({"max_new_tokens": 6, "batch_size": 4} | settings))


def peak_beyond(model: Any, work: Callable[[], Any]) -> int:
    """Most bytes of tensors that ``work`` holds at once on top of the model's."""
    tracker = MemoryTracker()
    tracker.watch(module_tensors(model), "weights")
    before = tracker.live
    with tracker:
        work()
    return tracker.peak - before


def plain_loss(model: Any, embedded: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Cross-entropy of ``answer`` behind embedded rows [T, D], all of it in one plain forward."""
    ids = torch.tensor(answer)
    rows = torch.cat((embedded, model.get_input_embeddings()(ids)))
    logits = model(inputs_embeds=rows.unsqueeze(0).to(model.dtype)).logits[0]
    return torch.nn.functional.cross_entropy(logits[len(embedded) - 1 : -1].to(embedded.dtype), ids)
