"""Batched greedy generation equals one-by-one generation, for a plain and a peft model, and leaves the
model as it was.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation import generate
from repbend_fast.evaluation.generate import Answer, end_tokens, generate_answers, generate_measured

EOS = 2


class StubTokenizer:
    pad_token_id = None
    eos_token_id = EOS

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids)


class StubEncoder:
    """Ids made from the letters, so that prompts differ in length."""

    tokenizer = StubTokenizer()

    def prompt_ids(self, messages, prefill: str = "", tools: str = "") -> list[int]:
        return [1, *(3 + ord(c) % 60 for c in messages[-1].content + prefill)]


PROMPTS = [Prompt("ordinary", text) for text in ("a", "which one of these is longer", "bcd", "hello there", "z")]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    # Weights of the usual size give one flat distribution; larger ones make the answers depend on the prompt.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def greedy_by_hand(model, ids: list[int], count: int) -> str:
    """No cache, no padding, no ``generate``."""
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == EOS:
                break
            ids = [*ids, token]
    return " ".join(map(str, ids[start:]))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "peft"])
def test_equals_greedy_by_hand_in_the_order_of_the_prompts(model, batch_size: int, adapter: bool):
    if adapter:
        model = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    encoder = StubEncoder()
    got = generate_answers(model, encoder, PROMPTS, max_new_tokens=9, batch_size=batch_size)
    model.eval()
    want = [greedy_by_hand(model, encoder.prompt_ids(p.conversation()), 9) for p in PROMPTS]
    assert got == want
    assert len(set(want)) > 2, "the test needs answers that differ"


def test_a_batch_without_memory_is_halved(model, monkeypatch):
    """Every answer comes out as in small batches, and nothing is asked in a size that failed before."""
    encoder, real, sizes = StubEncoder(), generate._generate_batch, []

    def with_room_for_two(base, tokenizer, encoded):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(base, tokenizer, encoded)

    want = generate_answers(model, encoder, PROMPTS, max_new_tokens=9, batch_size=2)
    monkeypatch.setattr(generate, "_generate_batch", with_room_for_two)
    assert generate_answers(model, encoder, PROMPTS, max_new_tokens=9, batch_size=5) == want
    assert sizes == [5, 2, 2, 1]


def test_no_memory_for_one_prompt_is_said(model, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generate, "_generate_batch", never)
    with pytest.raises(UserError, match=r"prompt of 2 tokens.*2\.00 GiB.*max_new_tokens"):
        generate_answers(model, StubEncoder(), PROMPTS, batch_size=4)


def test_prefill_starts_the_answer_and_is_not_returned(model):
    encoder = StubEncoder()
    got = generate_answers(model, encoder, PROMPTS[:2], prefills=["xyz"] * 2, max_new_tokens=5)
    model.eval()
    assert got == [greedy_by_hand(model, encoder.prompt_ids(p.conversation(), "xyz"), 5) for p in PROMPTS[:2]]


def test_free_and_prefilled_answers_share_a_batch(model):
    encoder = StubEncoder()
    prompts, prefills = [PROMPTS[0], PROMPTS[1], PROMPTS[0]], ["", "", "xyz"]
    got = generate_answers(model, encoder, prompts, prefills=prefills, max_new_tokens=5, batch_size=3)
    model.eval()
    assert got == [
        greedy_by_hand(model, encoder.prompt_ids(p.conversation(), prefill), 5) for p, prefill in zip(prompts, prefills)
    ]
    assert got[0] != got[2]


def test_each_prompt_has_its_prefill(model):
    with pytest.raises(ValueError, match="shorter"):
        generate_answers(model, StubEncoder(), PROMPTS[:2], prefills=["xyz"], max_new_tokens=5)


def test_answer_stops_at_the_end_token(model):
    encoder = StubEncoder()
    free = generate_answers(model, encoder, PROMPTS[:1], max_new_tokens=6)[0].split()
    model.generation_config.eos_token_id = [int(free[3]), EOS]
    stopped = generate_answers(model, encoder, PROMPTS, max_new_tokens=6)[0].split()
    assert stopped == free[: free.index(free[3])]


def test_lengths_and_who_stopped_are_told(model):
    """One answer ends by itself, the other is cut; the end itself is no part of an answer's length."""
    encoder = StubEncoder()
    free = [a.split() for a in generate_answers(model, encoder, PROMPTS[:2], max_new_tokens=6)]
    end = next(token for token in free[0] if token not in free[1])
    model.generation_config.eos_token_id = int(end)
    length = free[0].index(end)
    for batch_size in (1, 2):
        got = generate_measured(model, encoder, PROMPTS[:2], max_new_tokens=6, batch_size=batch_size)
        assert got == [Answer(" ".join(free[0][:length]), length, True), Answer(" ".join(free[1]), 6, False)]


def test_training_modes_and_generation_settings_are_restored(model):
    model.train()
    model.model.layers[0].eval()
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    before = [m.training for m in model.modules()]
    generate_answers(model, StubEncoder(), PROMPTS, max_new_tokens=2)
    assert [m.training for m in model.modules()] == before
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.6, True)


def test_training_modes_are_restored_after_a_failure(model):
    class Broken(StubEncoder):
        tokenizer = type("T", (StubTokenizer,), {"decode": lambda *a, **k: 1 / 0})()

    model.train()
    with pytest.raises(ZeroDivisionError):
        generate_answers(model, Broken(), PROMPTS, max_new_tokens=2)
    assert all(m.training for m in model.modules())


def test_sampling_settings_of_a_model_have_no_effect_and_cause_no_warnings(model, caplog):
    plain = generate_answers(model, StubEncoder(), PROMPTS, max_new_tokens=9)
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=3.0, max_length=7
    )
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert generate_answers(model, StubEncoder(), PROMPTS, max_new_tokens=9) == plain
    assert not caplog.records


def test_no_prompts_give_no_answers(model):
    assert generate_answers(model, StubEncoder(), [], max_new_tokens=2) == []


def test_end_tokens_join_model_and_tokenizer():
    tokenizer = StubTokenizer()
    assert end_tokens(None, tokenizer) == [EOS]
    assert end_tokens(7, tokenizer) == [7, EOS]
    assert end_tokens([EOS, 7], tokenizer) == [EOS, 7]


def test_every_batch_says_how_many_prompts_it_answered(model):
    counts: list[int] = []
    generate_answers(model, StubEncoder(), PROMPTS, max_new_tokens=2, batch_size=2, done=counts.append)
    assert counts == [2, 2, 1]
