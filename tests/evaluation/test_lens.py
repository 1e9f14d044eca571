"""The lens against transformers' own hidden states, norm and head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from other_families import other_model
from tiny_models import adapted_model, tiny_model

from repbend_fast.errors import UserError
from repbend_fast.evaluation import lens
from repbend_fast.evaluation.lens import read_layers, word_of
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.switches import reference_model

IDS = [1, 17, 44, 3, 80, 21, 9, 62, 30]
SCALE = 4.0


FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "qwen3_moe", "granite")


def made(family: str) -> Any:
    if family in ("gpt_neox", "qwen3_moe", "granite"):
        model = other_model(family, **({"logits_scaling": SCALE} if family == "granite" else {}))
        norm = getattr(find_decoder(model).body, str(find_decoder(model).norm_name))
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.5)  # normed once too often then shows
        return model
    return tiny_model(family)


def plainly(model: Any, family: str) -> torch.Tensor:
    """Log-probabilities [layers, T, V] from all hidden states at once."""
    out = model(torch.tensor([IDS]), output_hidden_states=True)
    decoder = find_decoder(model)
    norm = getattr(decoder.body, str(decoder.norm_name))
    states = [norm(h) for h in out.hidden_states[:-1]] + [out.hidden_states[-1]]
    logits = torch.stack([model.get_output_embeddings()(h)[0] for h in states])
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    logits = logits / SCALE if family == "granite" else logits
    torch.testing.assert_close(logits[-1], out.logits[0])
    return logits.log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_is_norm_and_head_on_every_hidden_state(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family)
    with torch.no_grad():
        scores = plainly(model, family)
    monkeypatch.setattr(lens, "CHUNK_LOGITS", 4 * 89)  # rows of a chunk then end within a layer
    reading = read_layers(model, IDS)
    best, index = scores.max(-1)
    assert reading.ids == index.tolist()
    torch.testing.assert_close(torch.tensor(reading.probabilities), best.exp())
    torch.testing.assert_close(torch.tensor(reading.entropies), -(scores.exp() * scores).sum(-1), atol=1e-5, rtol=1e-5)
    # The values tell layers apart, and a norm too many would show.
    assert len({tuple(row) for row in reading.ids}) > 1
    end = read_layers(model, IDS, last=3)
    assert end.ids == [row[-3:] for row in reading.ids]
    assert "forward" not in find_decoder(model).body.__dict__


def test_no_chunk_of_logits_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(lens, "CHUNK_LOGITS", 5 * 89)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    read_layers(model, IDS)
    assert max(seen) <= 5 * 89
    assert sum(seen) == 5 * len(IDS) * 89


def test_an_adapter_counts_and_switched_off_does_not() -> None:
    model = adapted_model("llama", trained=True)
    bent = read_layers(model, IDS)
    with reference_model(model):
        base = read_layers(model, IDS)
    plain = read_layers(tiny_model("llama"), IDS)
    assert base.ids == plain.ids
    assert base.entropies == plain.entropies
    assert bent.entropies != base.entropies
    assert bent.entropies[0] == base.entropies[0]


def test_entropy_of_a_sure_and_of_a_clueless_head() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    reading = read_layers(model, IDS)
    assert reading.entropies[0] == pytest.approx([math.log(89)] * len(IDS), rel=1e-5)
    model.lm_head.weight.data[7] = 1e4 * find_decoder(model).body.norm.weight.data.sign()
    assert min(min(row) for row in read_layers(model, IDS).entropies) == pytest.approx(0.0, abs=1e-6)


def test_a_norm_of_unknown_name_is_named() -> None:
    model = tiny_model("llama")
    body = model.model
    body.strange = body.norm
    del body.norm
    with pytest.raises(UserError, match=r"llama: the name of its final norm"):
        read_layers(model, IDS)


class Halves:
    """A tokenizer whose token 1 is a part of a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return {0: " word", 1: "\ufffd", 2: ""}[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return {1: "<0xE2>"}.get(token)


def test_tokens_without_a_text_of_their_own_have_a_name() -> None:
    assert [word_of(Halves(), token) for token in range(3)] == [" word", "<0xE2>", "#2"]
