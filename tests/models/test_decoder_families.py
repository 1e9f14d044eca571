"""The truncated, tapped pass on a tiny random model of each family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_compare import assert_matches
from tiny_models import BLOCKS, FAMILIES, VOCABULARY, adapted_model, flat, objective_config, run_step, tiny_model
from torch import Tensor, nn

from repbend_fast.config.schema import LoraConfig, MemoryConfig
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, find_head, run_decoder
from repbend_fast.models.layers.lora import use_low_rank_forward
from repbend_fast.models.layers.packing import pack
from repbend_fast.step.proof import check_head

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family):
    return tiny_model(family)


def _visited(model, stop: int, **arguments) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}

    def visit(layer: int, hidden: Tensor) -> Tensor:
        assert layer not in seen
        seen[layer] = hidden
        return hidden

    run_decoder(find_decoder(model), IDS, stop=stop, visit=visit, **arguments)
    return seen


def test_hidden_states_equal_transformers_to_the_bit(base) -> None:
    with torch.no_grad():
        expected = base(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
        assert len(expected) == BLOCKS + 1
        for stop in range(1, BLOCKS + 1):
            seen = _visited(base, stop)
            assert list(seen) == list(range(stop + 1))
            for layer, hidden in seen.items():
                assert torch.equal(hidden, expected[layer]), f"stop {stop}, hidden state {layer}"


def test_sliding_windows_are_in_use(base, family) -> None:
    """The families that slide see the difference within the tests' lengths, so equality above covers their masks."""
    changed = IDS.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        seen = _visited(base, 1)[1]
        other: dict[int, Tensor] = {}
        run_decoder(find_decoder(base), changed, stop=1, visit=lambda layer, h: other.setdefault(layer, h))
    slides = family in ("mistral", "gemma2", "gemma3", "phi3")
    assert torch.equal(seen[:, 5:], other[1][:, 5:]) == slides
    assert not torch.equal(seen[:, :5], other[1][:, :5])


def test_right_padding_and_packing_change_no_real_row(base) -> None:
    lengths = (13, 8)
    row = torch.cat([IDS[i, :n] for i, n in enumerate(lengths)])[None]
    flatly: dict[int, Tensor] = {}
    with torch.no_grad():
        padded = _visited(base, BLOCKS)
        run_decoder(
            find_decoder(base), row, packed=pack(lengths, CPU), stop=BLOCKS, visit=lambda k, h: flatly.setdefault(k, h)
        )
        alone: dict[int, Tensor] = {}
        run_decoder(find_decoder(base), IDS[1:, :8], stop=BLOCKS, visit=lambda k, h: alone.setdefault(k, h))
    for layer in range(BLOCKS + 1):
        assert_matches(padded[layer][1, :8], alone[layer][0], tolerance=1e-5, name=f"padded {layer}")
        assert_matches(flatly[layer][0, 13:], alone[layer][0], tolerance=1e-5, name=f"packed {layer}")
        assert_matches(flatly[layer][0, :13], padded[layer][0], tolerance=1e-5, name=f"packed {layer}")


def test_what_a_visit_returns_is_what_the_pass_goes_on_with(base) -> None:
    for changed in range(BLOCKS):
        seen: dict[int, Tensor] = {}

        def visit(layer: int, hidden: Tensor, changed=changed, seen=seen) -> Tensor:
            seen[layer] = hidden
            return hidden * 1.5 if layer == changed else hidden

        with torch.no_grad():
            plain = _visited(base, BLOCKS)
            run_decoder(find_decoder(base), IDS, stop=BLOCKS, visit=visit)
        for layer in range(BLOCKS + 1):
            assert torch.equal(seen[layer], plain[layer]) == (layer <= changed)


def test_the_decoder_is_restored_after_an_exception(base) -> None:
    decoder = find_decoder(base)
    layers, norm = decoder.layers, getattr(decoder.body, decoder.norm_name)

    def fail(layer: int, hidden: Tensor) -> Tensor:
        if layer == 2:
            raise KeyboardInterrupt
        return hidden

    with torch.no_grad():
        before = base(input_ids=IDS, use_cache=False).logits
        with pytest.raises(KeyboardInterrupt):
            run_decoder(decoder, IDS, stop=3, visit=fail)
        assert decoder.body.layers is layers
        assert getattr(decoder.body, decoder.norm_name) is norm
        assert torch.equal(base(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("stop", [0, BLOCKS + 1, -1])
def test_stop_out_of_range(base, stop) -> None:
    with pytest.raises(ValueError, match="stop"):
        run_decoder(find_decoder(base), IDS, stop=stop, visit=lambda layer, hidden: hidden)


def test_head_gives_the_models_logits(base, family) -> None:
    head = find_head(base)
    check_head(base, head)
    assert (head.softcap == 3.0) == (family == "gemma2")
    with torch.no_grad():
        hidden = _visited(base, BLOCKS)[BLOCKS]
        logits = hidden @ head.weight.T
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
            assert (logits.abs() > 0.6 * head.softcap).any()
        assert_matches(logits, base(input_ids=IDS, use_cache=False).logits, tolerance=1e-5)


def test_a_step_trains_every_adapted_block(family) -> None:
    """Padded, packed with recomputation, and split pieces: the same finite, non-zero gradients."""
    model = adapted_model(family)
    config = objective_config(pair=0.4)
    _, got = run_step(model, config, memory=MemoryConfig(packing="off"))
    blocks = {name.split(".layers.")[1].split(".")[0] for name, g in got.items() if g.abs().max() > 0}
    assert blocks == {"0", "1", "2", "3"}
    assert all(torch.isfinite(g).all() for g in got.values())
    assert all(g.abs().max() > 0 for name, g in got.items())
    for memory in (MemoryConfig(packing="on", checkpoint_blocks="all"), MemoryConfig(packing="on", piece_tokens=30)):
        _, other = run_step(model, config, memory=memory)
        assert_matches(flat(other), flat(got), tolerance=5e-5)


def test_a_head_that_the_kl_does_not_know_is_refused() -> None:
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "logits_scaling": 8.0,
    }
    model = (
        transformers.AutoModelForCausalLM.from_config(transformers.GraniteConfig(**settings))
        .eval()
        .requires_grad_(False)
    )
    head = find_head(model)
    check_head(model, head)
    with pytest.raises(UserError, match=r"granite.*objective\.kl=0"):
        check_head(model, replace(head, scale=None))
    gemma = tiny_model("gemma2")
    head = find_head(gemma)
    gemma.config.final_logit_softcapping = None
    with pytest.raises(UserError, match="gemma2"):
        check_head(gemma, head)


def test_heads_that_are_not_plain_or_not_frozen_are_refused() -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UserError, match="trainable"):
        find_head(model)
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="Sequential"):
        find_head(model)


def test_a_model_without_decoder_layers_is_refused() -> None:
    import transformers

    config = transformers.XLMConfig(emb_dim=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY)
    with pytest.raises(UserError, match="xlm"):
        find_decoder(transformers.AutoModelForCausalLM.from_config(config))


def test_only_lora_drops_out() -> None:
    """A model's own dropout stays off even in the adapted pass, and LoRA's is off again afterwards."""
    import transformers

    from repbend_fast.models import attach_lora, lora_dropout

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.Phi3Config(**settings, pad_token_id=0, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    base = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = attach_lora(base, LoraConfig(r=2, dropout=0.5), (1,))
    use_low_rank_forward(model)
    ids, keys = torch.arange(3, 12)[None], torch.arange(9)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with lora_dropout(model, keys):
            # B is 0: whatever LoRA drops changes nothing, and a model's own dropout would.
            assert torch.equal(model(input_ids=ids).logits, plain)
            assert not any(m.training for m in model.modules())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        plain = model(input_ids=ids).logits
        with lora_dropout(model, keys):
            assert not torch.equal(model(input_ids=ids).logits, plain)
        assert torch.equal(model(input_ids=ids).logits, plain)
