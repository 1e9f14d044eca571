"""What LoRA adapts of each kind of block, what NF4 leaves as it is, and which names are refused."""

from __future__ import annotations

import pytest
import torch
from other_families import other_model
from tiny_models import tiny_model

from repbend_fast.config.schema import LoraConfig
from repbend_fast.errors import UserError
from repbend_fast.models import attach_lora, quantize_nf4
from repbend_fast.models.adapters import PUBLISHED, settled_lora
from repbend_fast.models.coverage import coverage_of

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_every_weight_of_a_plain_block_is_adapted() -> None:
    kinds = coverage_of(attach_lora(tiny_model(), LoraConfig(r=2), (2,)))
    assert [(kind.blocks, kind.wanted) for kind in kinds] == [((0, 1, 2), True), ((3,), False)]
    assert kinds[0].weights == kinds[0].adapted == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert kinds[1].adapted == 0
    assert not any(kind.notes() for kind in kinds)


def test_experts_are_left_out_by_name() -> None:
    (kind,) = coverage_of(attach_lora(other_model("qwen2_moe"), LoraConfig(r=2, target_modules=[*PUBLISHED]), (2,)))
    experts = {"mlp.experts.gate_up_proj": 4 * 128 * 64, "mlp.experts.down_proj": 4 * 64 * 64}
    assert kind.left_out == experts | {"mlp.gate": 4 * 64, "mlp.shared_expert_gate": 64}
    assert kind.weights == kind.adapted + sum(kind.left_out.values())
    (note,) = kind.notes()
    assert "67%" in note
    assert "mlp.experts.gate_up_proj (32,768)" in note


def test_blocks_of_a_hybrid_model_are_told_apart() -> None:
    model = attach_lora(other_model("bamba"), LoraConfig(r=2, target_modules=ATTENTION), (2,))
    mamba, attention = coverage_of(model)
    assert (mamba.blocks, mamba.adapted) == ((0,), 0)
    assert attention.adapted == 2 * 64 * 64 + 2 * 64 * 32
    assert "100%" in mamba.notes()[0]
    assert "mamba.in_proj" in mamba.notes()[0]


def test_experts_that_nf4_leaves_as_they_are_are_named() -> None:
    model = other_model("qwen3_moe")
    quantize_nf4(model, torch.float32, True, torch.device("cpu"))
    (kind,) = coverage_of(attach_lora(model, LoraConfig(r=2, target_modules=ATTENTION), (2,)))
    assert kind.weights == coverage_of(other_model("qwen3_moe"))[0].weights
    assert kind.adapted == 2 * 64 * 64 + 2 * 64 * 32
    assert sum(count for name, count in kind.unquantized.items() if "experts" in name) == 4 * 128 * 64 + 4 * 64 * 64
    assert any("nf4" in note and "mlp.experts.gate_up_proj (32,768)" in note for note in kind.notes())


def test_target_names_are_looked_up_in_all_blocks() -> None:
    first, second = coverage_of(
        attach_lora(other_model("lfm2"), LoraConfig(r=2, target_modules=["q_proj", "w1"]), (2,))
    )
    assert first.adapted == 16384
    assert second.adapted == 16384 + 64 * 64


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("gpt_neox", ["q_proj"], "are dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
        ("nanochat", ["gate_proj"], "are fc1, fc2, k_proj, o_proj, q_proj, v_proj"),
        ("qwen3_moe", ["down_proj"], "its experts are parameters, not linear layers"),
        (
            "deepseek_v2",
            ["o_proj", "gate_proj", "up_proj", "down_proj"],
            "reads gate_proj, up_proj, down_proj as the experts",
        ),
        ("deepseek_v2", ["o_proj", "gate_proj"], "reads gate_proj as the experts"),
    ],
)
def test_an_error_helps_to_the_right_names(family, targets, expected) -> None:
    with pytest.raises(UserError) as caught:
        attach_lora(other_model(family), LoraConfig(target_modules=targets), (2,))
    assert expected in str(caught.value)
    assert "ParamWrapper" not in str(caught.value)


def test_what_the_error_offers_can_be_adapted() -> None:
    offered = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
    kinds = coverage_of(attach_lora(other_model("deepseek_v2"), LoraConfig(r=2, target_modules=offered), (2,)))
    assert all(kind.adapted for kind in kinds)


AUTO = {
    "bamba": {"in_proj", "out_proj", *PUBLISHED},
    "deepseek_v2": {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"},
    "gpt2": {"c_attn", "c_fc", "c_proj"},
    "gpt_neox": {"dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"},
    "lfm2": {"in_proj", "k_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3"},
    "llama4": {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"},
    "mpt": {"Wqkv", "down_proj", "out_proj", "up_proj"},
    "nanochat": {"fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"},
    "qwen2_moe": {*PUBLISHED, "shared_expert_gate"},
    "qwen3_moe": {*PUBLISHED[:4]},
}


@pytest.mark.parametrize("family", AUTO)
def test_auto_takes_the_linear_layers_of_all_blocks_whatever_their_names(family) -> None:
    """Routers that derive from a linear layer and give a tuple are none, nor are names that peft keeps for experts."""
    base = other_model(family)
    with torch.device("meta"):
        bare = type(base)(base.config)
    names = settled_lora(base, LoraConfig()).target_modules
    assert set(names) == AUTO[family]
    assert settled_lora(bare, LoraConfig()).target_modules == names
    for kind in coverage_of(attach_lora(base, LoraConfig(r=2), (2,))):
        assert kind.adapted > 0


def test_auto_is_the_published_list_where_there_are_no_others() -> None:
    assert settled_lora(tiny_model("qwen3"), LoraConfig()).target_modules == list(PUBLISHED)
    fused = settled_lora(tiny_model("phi3"), LoraConfig()).target_modules
    assert fused == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    own = LoraConfig(target_modules=["v_proj"])
    assert settled_lora(tiny_model("phi3"), own).target_modules == ["v_proj"]
