"""The trained adapter: where it goes, what it refuses, how it is switched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from repbend_kernels.keyed_dropout import row_hashes
from tiny_models import BLOCKS, FAMILIES, VOCABULARY, objective_config, run_step, tiny_model, wrap

from repbend_fast.config.schema import LoraConfig
from repbend_fast.errors import UserError
from repbend_fast.models import (
    attach_lora,
    find_head,
    lora_dropout,
    reference_model,
    trainable_parameters,
    use_low_rank_forward,
)
from repbend_fast.step.proof import check_head

IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))


def _places(model: Any) -> dict[int, set[str]]:
    """Names of the adapted layers by block."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parts = name.split(".layers.")[1].split(".")
            found.setdefault(int(parts[0]), set()).add(parts[2])
    return found


@pytest.mark.parametrize(
    ("window", "blocks", "expected"),
    [
        ((1, 2), "to_window", {0, 1, 2}),
        ((2,), "to_window", {0, 1, 2}),
        ((BLOCKS - 1, BLOCKS), "to_window", set(range(BLOCKS))),
        ((1,), [3], {3}),
        ((3,), [2, 0], {0, 2}),
    ],
)
def test_blocks(window, blocks, expected) -> None:
    places = _places(attach_lora(tiny_model(), LoraConfig(r=2, blocks=blocks), window))
    assert set(places) == expected
    for names in places.values():
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_rank_scale_dropout_and_dtype() -> None:
    for dtype in ("float32", "bfloat16"):
        lora = LoraConfig(r=3, alpha=6, dropout=0.25, dtype=dtype)
        model = attach_lora(tiny_model(dtype=torch.bfloat16), lora, (1,))
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        assert layer.scaling == {"default": 2.0}
        assert layer.lora_A["default"].weight.shape == (3, 128)
        assert layer.lora_dropout["default"].p == 0.25
        assert {p.dtype for p in trainable_parameters(model)} == {getattr(torch, dtype)}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert not any(m.training for m in model.modules())


def test_phi3_fuses_projections() -> None:
    places = _places(attach_lora(tiny_model("phi3"), LoraConfig(r=2), (1,)))
    assert places[0] == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    places = _places(attach_lora(tiny_model("phi3"), LoraConfig(r=2, target_modules=["v_proj", "qkv_proj"]), (1,)))
    assert places[0] == {"qkv_proj"}


def test_a_vision_tower_is_left_alone() -> None:
    """Gemma-3's larger models carry one, with blocks and projections of the same names."""
    import transformers

    text = FAMILIES["gemma3"]().to_dict()
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    assert any("vision" in name and name.endswith("q_proj") for name, _ in base.named_modules())
    model = wrap(base)
    check_head(model, find_head(model))
    assert set(_places(model)) == set(range(BLOCKS))
    assert not any("vision" in name for name, p in model.named_parameters() if p.requires_grad)
    _, got = run_step(model, objective_config())
    assert all(g.abs().max() > 0 for g in got.values())


def test_wrong_targets_are_refused() -> None:
    for lora, expected in (
        (LoraConfig(target_modules=["q_proj", "c_attn"]), "no layer named c_attn"),
        (LoraConfig(target_modules=["lm_head", "q_proj"]), "lm_head cannot be adapted"),
        (LoraConfig(blocks=[0, BLOCKS]), f"the model has blocks 0 … {BLOCKS - 1}"),
        (LoraConfig(target_modules=["input_layernorm"]), "lora.target_modules"),
        (LoraConfig(target_modules=["mlp"]), "lora.target_modules"),
    ):
        with pytest.raises(UserError) as caught:
            attach_lora(tiny_model(), lora, (2,))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_fresh_adapter_changes_nothing_and_the_reference_is_the_base() -> None:
    base = tiny_model()
    with torch.no_grad():
        expected = base(input_ids=IDS, use_cache=False).logits
        assert torch.equal(wrap(base, trained=False)(input_ids=IDS, use_cache=False).logits, expected)
        trained = wrap(tiny_model())
        assert not torch.allclose(trained(input_ids=IDS, use_cache=False).logits, expected, atol=0.1)
        with reference_model(trained):
            assert torch.equal(trained(input_ids=IDS, use_cache=False).logits, expected)


def test_the_reference_leaves_the_adapter_as_it_was() -> None:
    model = wrap(tiny_model())
    before = [name for name, p in model.named_parameters() if p.requires_grad]

    def interrupted() -> None:
        with reference_model(model):
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    assert torch.is_grad_enabled()
    assert not model.get_base_model().model.layers[0].mlp.down_proj.disable_adapters


def test_the_reference_is_what_peft_s_own_switch_gives() -> None:
    """Also with trained copies of whole modules, with a layer that was off before, and with a part of the adapter
    frozen.
    """
    config = PeftLoraConfig(
        target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.add_(1.0)
        on = model(input_ids=IDS, use_cache=False).logits
        with model.disable_adapter():
            expected = model(input_ids=IDS, use_cache=False).logits
    layers = model.get_base_model().model.layers
    layers[0].mlp.down_proj.lora_A["default"].weight.requires_grad_(False)
    layers[1].mlp.down_proj._disable_adapters = True
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    with reference_model(model):
        got = model(input_ids=IDS, use_cache=False).logits
        assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    assert torch.equal(got, expected)
    assert not torch.allclose(on, expected, atol=0.1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    assert layers[1].mlp.down_proj.disable_adapters
    assert not layers[0].mlp.down_proj.disable_adapters


def test_dropout_is_restored() -> None:
    model = attach_lora(tiny_model(), LoraConfig(r=2, dropout=0.5), (1,))
    use_low_rank_forward(model)
    shared = model.get_base_model().model.layers[0].mlp.down_proj.dropout_keys
    keys = torch.arange(22).view(2, 11)

    def interrupted() -> None:
        with lora_dropout(model, keys):
            assert torch.equal(shared.rows, row_hashes(torch.arange(22)))
            with lora_dropout(model, None):
                assert shared.rows is None
            assert shared.rows is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert shared.rows is None
