"""Greedy answers for a list of prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.evaluation.decoding import new_tokens, padded
from repbend_fast.evaluation.halving import SHORTER, Chunks
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.switches import evaluation_mode, generation_settings, weights_cast_once


class PromptEncoder(Protocol):
    """What generation needs of ``repbend_fast.data.tokenize.ChatEncoder``."""

    tokenizer: Tokenizer

    def prompt_ids(self, messages: Seq[Message], prefill: str = "", tools: str = "") -> list[int]:
        """Token ids up to where the answer (after ``prefill``) goes on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``text`` without special tokens and prefill. ``tokens``: how many the model wrote before it ended, its end not
    counted. ``stopped``: it ended by itself, and was not cut at ``max_new_tokens``.
    """

    text: str
    tokens: int
    stopped: bool


def _prompt_ids(encoder: PromptEncoder, prompt: Prompt, prefill: str) -> list[int]:
    """Raises ``UserError`` that names the prompt where a template does not take its conversation."""
    try:
        return encoder.prompt_ids(prompt.conversation(), prefill, prompt.tools)
    except UserError as error:
        if prompt.messages is None or not prompt.source_id:
            raise
        raise UserError(f"{prompt.source_id}: {error}") from error


def generate_answers(
    model: CausalLM,
    encoder: PromptEncoder,
    prompts: Seq[Prompt],
    *,
    prefills: Seq[str] = (),
    max_new_tokens: int = 64,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """One greedy answer per prompt, in the order of ``prompts``, without special tokens and without its prefill.

    ``prefills``: how each answer is made to begin, one for each prompt; empty = all of them free.

    See :func:`generate_measured`, which tells their lengths too.
    """
    answers = generate_measured(
        model,
        encoder,
        prompts,
        prefills=prefills,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        ranks=ranks,
        done=done,
    )
    return [answer.text for answer in answers]


def generate_measured(
    model: CausalLM,
    encoder: PromptEncoder,
    prompts: Seq[Prompt],
    *,
    prefills: Seq[str] = (),
    max_new_tokens: int = 64,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
    ranks: Ranks = ALONE,
) -> list[Answer]:
    """One greedy answer per prompt, in the order of ``prompts``.

    ``model`` is a transformers causal LM or a peft model around one; its training mode and generation settings are as
    before afterwards. A batch that does not fit into memory is halved, and those after it have no more prompts.
    ``done`` hears of every batch how many prompts it answered. Each of ``ranks`` generates a part, and has the answers
    of all.

    Raises:
        UserError: there is no memory for a single prompt.
    """
    encoded = [
        _prompt_ids(encoder, p, prefill) for p, prefill in zip(prompts, prefills or [""] * len(prompts), strict=True)
    ]
    order = ranks.part(sorted(range(len(prompts)), key=lambda i: len(encoded[i])))
    # LoRA lives inside the modules, so the wrapped model generates with it; peft's own `generate` would put back its
    # settings.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = _greedy(base.generation_config, encoder.tokenizer, max_new_tokens)
    # FSDP's own tensors must not be made in inference mode.
    without_graph = torch.no_grad() if ranks.lockstep else torch.inference_mode()
    generate = partial(_generate_batch, lockstep=True) if ranks.lockstep else _generate_batch
    cast_once = nullcontext() if ranks.lockstep else weights_cast_once(base)
    with evaluation_mode(base), without_graph, generation_settings(base, settings), cast_once:

        def work(chosen: slice) -> list[Answer]:
            written = generate(base, encoder.tokenizer, [encoded[i] for i in order[chosen]])
            done(len(written))
            return written

        remedy = "lower max_new_tokens, " + SHORTER
        chunks = Chunks(batch_size, find_decoder(base).device, "generation", remedy, whole=ranks.lockstep)
        found = chunks.over(len(order), work, lambda i: f" of an answer to a prompt of {len(encoded[order[i]])} tokens")
    answers = dict(zip(order, chain.from_iterable(found), strict=True))
    everywhere = {i: answer for part in ranks.gathered(answers) for i, answer in part.items()}
    return [everywhere[i] for i in range(len(prompts))]


def _greedy(own: GenerationConfig, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy settings, with the ends of the model's ``own``.

    They replace the model's: ``generate`` fills whatever a passed configuration leaves open (a repetition penalty, say)
    from the model's.
    """
    ends = end_tokens(own.eos_token_id, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
    )


def end_tokens(configured: int | list[int] | None, tokenizer: Tokenizer) -> list[int]:
    """Every id that ends an answer: the model's own, and the tokenizer's (a chat model's turn end is often
    only there).
    """
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def _generate_batch(
    model: CausalLM, tokenizer: Tokenizer, encoded: list[list[int]], lockstep: bool = False
) -> list[Answer]:
    """Answers of one batch. In ``lockstep`` it goes on until the batches of all processes have ended."""
    settings = model.generation_config
    device = find_decoder(model).device
    if lockstep:
        ids, mask = padded(encoded, settings.pad_token_id)
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), synced_gpus=True)
        found = out[:, ids.shape[1] :].tolist()
    else:
        found = new_tokens(model, encoded, device)
    return [_until_end(tokenizer, row, settings.eos_token_id or []) for row in found]


def _until_end(tokenizer: Tokenizer, ids: list[int], ends: list[int]) -> Answer:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(ids[:stop], skip_special_tokens=True)).strip()
    return Answer(text, stop, stop < len(ids))


@contextmanager
def greedy_generation(model: CausalLM, tokenizer: Tokenizer, max_new_tokens: int) -> Iterator[None]:
    """While entered, ``model.generate`` is greedy with a KV cache, in evaluation mode, and keeps no graph.

    ``model`` is a causal LM without a PEFT wrapper. Afterwards mode and generation settings are as before.
    """
    settings = _greedy(model.generation_config, tokenizer, max_new_tokens)
    with evaluation_mode(model), torch.inference_mode(), generation_settings(model, settings):
        yield


def answer_texts(model: CausalLM, tokenizer: Tokenizer, generated: Tensor) -> list[str]:
    """The texts of newly generated ids [B, n], each up to its end, by the settings that ``model`` generates with."""
    ends = model.generation_config.eos_token_id or []
    return [_until_end(tokenizer, row, ends).text for row in generated.tolist()]
