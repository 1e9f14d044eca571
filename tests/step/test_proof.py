"""What is shown for a model at load, on families that break an assumption and on some that do not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from other_families import other_model
from tiny_models import FAMILIES, tiny_model

from repbend_fast.config.schema import LoraConfig
from repbend_fast.errors import UserError
from repbend_fast.models import attach_lora, find_decoder, find_head, quantize_nf4, run_decoder, use_low_rank_forward
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.proof import Proof, check_head, prove_model

LEAKING = ("gpt_oss", "bamba", "qwen3_next", "lfm2", "recurrent_gemma")
DTYPES = (torch.float32, torch.bfloat16)


def _prove(model, asked: str = "auto", autocast: torch.dtype | None = None) -> Proof:
    decoder = find_decoder(model)
    return prove_model(
        ModelParts(model, decoder, find_head(model), decoder.device, autocast), "off" if asked == "off" else "on", asked
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", LEAKING)
def test_where_packing_leaks_sequences_are_padded(family, dtype) -> None:
    proof = _prove(other_model(family, dtype))
    held = {check.name: check.holds for check in proof.checks}
    assert held.pop("packed = alone") is False
    assert all(held.values())
    assert proof.packing == "off"
    assert any("padded instead" in note for note in proof.notes)


def test_packing_that_was_asked_for_is_refused_where_it_leaks() -> None:
    with pytest.raises(UserError, match=r"gpt_oss.*memory\.packing=on.*see each other") as caught:
        _prove(other_model("gpt_oss"), asked="on")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, "nanochat", "qwen2_moe", "qwen3_moe", "gpt_neox"])
def test_right_families_stay_packed(family, dtype) -> None:
    proof = _prove(tiny_model(family, dtype) if family in FAMILIES else other_model(family, dtype))
    assert proof.packing == "on"
    assert len(proof.checks) == 5
    assert all(check.holds for check in proof.checks)


def test_under_autocast_and_in_nf4() -> None:
    assert _prove(tiny_model("gemma2"), autocast=torch.bfloat16).packing == "on"
    model = tiny_model("qwen3", torch.bfloat16)
    quantize_nf4(model, torch.bfloat16, True, torch.device("cpu"))
    assert _prove(model).packing == "on"


def test_a_norm_that_is_used_before_the_blocks_too_stays_there() -> None:
    model = other_model("nanochat")
    decoder, ids = find_decoder(model), torch.arange(3, 12)[None]
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        run_decoder(decoder, ids, stop=1, visit=lambda layer, hidden: states.setdefault(layer, hidden))
    assert all(torch.equal(states[layer], expected[layer]) for layer in (0, 1))


def test_a_truncated_pass_that_is_not_the_full_one_is_refused() -> None:
    model = tiny_model()
    body = find_decoder(model).body

    def scale(module, args, kwargs):
        return args, kwargs | {"inputs_embeds": module.embed_tokens(kwargs.pop("input_ids")) * len(module.layers)}

    body.register_forward_pre_hook(scale, with_kwargs=True)
    with pytest.raises(UserError, match=r"stops at hidden state 1 gives another hidden state 0"):
        _prove(model)


def test_blocks_that_read_what_follows_are_refused() -> None:
    model = tiny_model()
    mlp = find_decoder(model).layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + hidden.mean(1, keepdim=True)
    with pytest.raises(UserError, match="padded on the right has other hidden states"):
        _prove(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [1 / 0.97, 1 / 0.99])
def test_a_scale_of_the_logits_is_seen(scaling, dtype) -> None:
    model = other_model("granite", dtype)
    check_head(model, find_head(model))
    model = other_model("granite", dtype, logits_scaling=scaling)
    head = find_head(model)
    check_head(model, head)
    with pytest.raises(UserError, match=r"granite.*scale 0\.9[79]"):
        check_head(model, replace(head, scale=None))
    model.config.logits_scaling = 1.0  # what a name promises and the model does not do
    with pytest.raises(UserError, match=r"granite.*scale 1\.0[13]"):
        check_head(model, head)


def test_the_way_round_the_head_names_every_term_that_reads_logits() -> None:
    model = other_model("granite")
    forward = model.forward

    def scaled(**arguments):
        output = forward(**arguments)
        output.logits = output.logits / 4.0
        return output

    model.forward = scaled
    with pytest.raises(UserError, match=r"objective\.kl=0 and no objective\.refusal"):
        _prove(model)


def test_adapted_layers_that_no_pass_calls_are_named() -> None:
    """A layer whose weight its block multiplies with itself: the adapter on it would train nothing, without a word."""
    model = attach_lora(tiny_model(), LoraConfig(r=2), (4,))
    use_low_rank_forward(model)
    assert not any("does nothing" in note for note in _prove(model).notes)
    for block in find_decoder(model).layers:
        block.mlp.forward = partial(_past_up_proj, block.mlp)
    (note,) = [note for note in _prove(model).notes if "does nothing" in note]
    assert note.startswith("note: LoRA does nothing on mlp.up_proj: ")


def _past_up_proj(mlp, hidden):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)) * (hidden @ mlp.up_proj.base_layer.weight.T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cap_or_a_bias_behind_the_head_is_seen(dtype) -> None:
    """A cap far above the logits of a random model, and a bias of a hundredth of them."""
    model = tiny_model("gemma2", dtype)
    head = find_head(model)
    model.config.final_logit_softcapping = 300.0
    with pytest.raises(UserError, match="gemma2"):
        check_head(model, head)
    model = tiny_model("llama", dtype)
    head = find_head(model)
    bias = 0.02 * torch.randn(head.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    forward = model.forward

    def biased(**arguments):
        output = forward(**arguments)
        output.logits = output.logits + bias * output.logits.std()
        return output

    model.forward = biased
    with pytest.raises(UserError, match="llama"):
        check_head(model, head)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "h"), ("mpt", "blocks"), ("xlstm", "blocks")])
def test_a_list_of_blocks_is_found_by_kind(family, name) -> None:
    decoder = find_decoder(other_model(family))
    assert (decoder.list_name, decoder.num_blocks) == (name, 2)
    assert decoder.layers is getattr(decoder.body, name)


def test_a_decoder_without_one_list_of_blocks_is_refused_truthfully() -> None:
    with pytest.raises(
        UserError, match=r"xlm.*no one list of 2 decoder blocks \(it has attentions \(2\), layer_norm1 \(2\), ffns"
    ) as caught:
        find_decoder(other_model("xlm"))
    assert "decoder-only" not in str(caught.value)


def test_llama4s_text_model_is_found() -> None:
    model = other_model("llama4")
    assert find_decoder(model).num_blocks == 2
    proof = _prove(model)
    assert proof.packing == "off"
    assert "chunks" in proof.notes[0]
