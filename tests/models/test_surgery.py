"""Preparing a model for a step and giving it back: afterwards it is the model that it was, whatever ran or failed in
between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_picture import Picture, changed, picture
from test_lora_forward import peft_model
from tiny_models import BLOCKS, FAMILIES, WINDOW, WITHOUT_DROPOUT, objective_config, ragged_batch, tiny_model

from repbend_fast.config import Config
from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import Prepared, attach_lora, prepared, quantize_nf4, reference_model, surgery
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.lora import LowRankForward
from repbend_fast.models.layers.offload import HostEmbedding
from repbend_fast.models.layers.switches import evaluation_mode, generation_settings, output_through
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamRunner, checked_runner
from repbend_fast.step import checked as checked_module
from repbend_fast.step.levers import Levers
from repbend_fast.step.proof import prove_model

CPU = torch.device("cpu")
DROPOUT = WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3})
MECHANISMS = (
    "use_varlen",
    "use_liger",
    "use_low_rank_forward",
    "use_lean_layers",
    "set_dropout_rate",
    "offload_embedding",
)
PACKED = Levers(packing="on", checkpoint_blocks=2)
Kind = str


def adapted(family: str = "llama", kind: Kind = "float") -> Any:
    """A model with PEFT's own adapter, part of it in training mode. It has run once: other packages note things at a
    first call.
    """
    base = tiny_model(family)
    if kind == "nf4":
        quantize_nf4(base, torch.float32, True, CPU)
    model = attach_lora(base, DROPOUT, WINDOW)
    model.get_base_model().model.layers[1].mlp.train()
    model(input_ids=torch.arange(3, 12)[None], output_hidden_states=True).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return model


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Prepared]:
    """``prepared`` with every mechanism at work on the CPU, where Liger's kernels do not run and nothing would leave
    for the host.
    """
    pytest.importorskip("liger_kernel", reason="Liger's layers need liger-kernel")
    from repbend_fast.models.layers.liger import replace_modules

    monkeypatch.setattr(surgery, "use_liger", lambda model, setting, device, changes: replace_modules(model, changes))
    monkeypatch.setattr(surgery, "has_own_memory", lambda device: True)
    return lambda model: prepared(model, Levers(offload_embedding=True), liger=True, dropout=0.7)


def run_on(ready: Prepared, levers: Levers = PACKED) -> None:
    """All that a run does with a model: the proof, a step, a measurement, the reference."""
    runner = StreamRunner(ready, levers)
    prove_model(runner.parts, "on", "auto")
    for stream in build_objective(objective_config(pair=0.4), BLOCKS).streams(ragged_batch(), 0):
        runner.backward(stream, dropout_seed=1)
        runner.measure(stream)
    ready.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "float") for family in FAMILIES), ("llama", "nf4"), ("phi3", "nf4")]
)
def test_a_model_comes_back_from_a_step_as_it_was(family, kind) -> None:
    model = adapted(family, kind)
    before = picture(model)
    ready = prepared(model, PACKED)
    places = changed(before, picture(model))
    assert any(place.endswith("q_proj: class") or place.endswith("qkv_proj: class") for place in places)
    assert any(place.endswith("input_layernorm: forward") for place in places)
    run_on(ready)
    ready.restore()
    assert changed(before, picture(model)) == []
    ready.restore()
    assert changed(before, picture(model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mechanism_is_taken_off_again(family, everything) -> None:
    model = adapted(family)
    before = picture(model)
    with everything(model):
        prepared_picture = picture(model)
        assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert changed(before, picture(model)) == []
    places = changed(before, prepared_picture)
    for part in (
        "embed_tokens: class",
        "lm_head: class",
        "input_layernorm: forward",
        "input_layernorm: in_place",
        "self_attn: forward",
    ):
        assert any(place.endswith(part) for place in places), part
    # Parameters, submodules and what is trained stay through all of it.
    assert not any("(parameter)" in place or place.endswith(("_modules", "_parameters")) for place in places)


@pytest.mark.parametrize("left_out", MECHANISMS)
def test_a_change_that_is_not_taken_back_is_seen(left_out, everything, monkeypatch) -> None:
    model, whole = adapted("gemma3"), getattr(surgery, left_out)

    def forgetful(*arguments: Any) -> Any:
        return whole(*arguments[:-1], Changes())

    monkeypatch.setattr(surgery, left_out, forgetful)
    before = picture(model)
    with everything(model):
        pass
    assert changed(before, picture(model)) != []


@pytest.mark.parametrize("when", ["first", "afterwards"])
@pytest.mark.parametrize("failing", MECHANISMS)
def test_an_error_midway_leaves_the_model_as_it_was(failing, when, everything, monkeypatch) -> None:
    model, whole = adapted(), getattr(surgery, failing)

    def fails(*arguments: Any) -> None:
        if when == "afterwards":
            whole(*arguments)
        raise MemoryError("no pinned memory left")

    monkeypatch.setattr(surgery, failing, fails)
    before = picture(model)
    with pytest.raises(MemoryError):
        everything(model)
    assert changed(before, picture(model)) == []


def test_an_adapter_that_is_refused_halfway_is_left_as_it_was() -> None:
    model = adapted()
    last = [module for module in model.modules() if hasattr(module, "lora_variant")][-1]
    last.lora_variant["default"] = object()
    before = picture(model)
    with pytest.raises(UserError, match="not plain LoRA"):
        prepared(model, Levers())
    assert changed(before, picture(model)) == []


def test_what_was_prepared_before_is_not_taken_off(everything) -> None:
    model = adapted()
    before = picture(model)
    outer = everything(model)
    within = picture(model)
    with everything(model):
        assert changed(within, picture(model)) == []
    assert changed(within, picture(model)) == []
    outer.restore()
    assert changed(before, picture(model)) == []


def test_a_runner_changes_nothing() -> None:
    model = adapted()
    with prepared(model, PACKED) as ready:
        before = picture(model)
        StreamRunner(ready, PACKED, autocast=torch.bfloat16)
        assert changed(before, picture(model)) == []


def test_attaching_leaves_the_layers_to_peft() -> None:
    assert not any(isinstance(module, LowRankForward) or "forward" in vars(module) for module in adapted().modules())


def test_a_model_that_fails_its_proof_is_given_back(monkeypatch) -> None:
    def fails(*arguments: Any) -> None:
        raise UserError("model type llama cannot be bent")

    monkeypatch.setattr(checked_module, "prove_model", fails)
    model = adapted()
    before = picture(model)
    config = Config(model=ModelConfig(name="m", device="cpu"), data={"sources": [{"path": "demo"}]})
    with pytest.raises(UserError, match="cannot be bent"):
        checked_runner(model, config, PACKED, True)
    assert changed(before, picture(model)) == []


def test_switches_are_put_back_after_an_error(everything) -> None:
    model = adapted()
    causal = model.get_base_model()
    with everything(model):
        before = picture(model)

        def interrupted() -> None:
            with (
                reference_model(model),
                evaluation_mode(model),
                generation_settings(causal, copy.copy(causal.generation_config)),
                output_through(causal.get_output_embeddings(), lambda logits: logits),
            ):
                assert changed(before, picture(model)) != []
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert changed(before, picture(model)) == []


def test_changes_are_taken_back_from_the_last_to_the_first() -> None:
    layer, changes = torch.nn.Linear(2, 2), Changes()
    before = picture(layer)
    changes.entry(vars(layer), "mark", 1)
    changes.entry(vars(layer), "mark", 2)
    with changes.made_by_others(layer):
        layer.mark = 3
        layer.other = 4
        del layer.in_features
    assert (layer.mark, layer.other) == (3, 4)
    changes.undo()
    assert changed(before, picture(layer)) == []


def test_no_dropout_rate_but_lora_s_is_set() -> None:
    model: Any = peft_model(torch.float32)
    own = model.get_base_model().own = torch.nn.Dropout(0.25)
    rates = [dropout for module in model.modules() for dropout in getattr(module, "lora_dropout", {}).values()]
    changes = Changes()
    surgery.set_dropout_rate(model, 0.0, changes)
    assert [dropout.p for dropout in rates] == [0.0, 0.0]
    assert own.p == 0.25
    changes.undo()
    assert [dropout.p for dropout in rates] == [0.3, 0.3]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_embedding_and_head_are_on_the_gpu_again(family) -> None:
    gpu = torch.device("cuda")
    model: Any = attach_lora(tiny_model(family).to(gpu), DROPOUT, WINDOW).to(gpu)
    model(input_ids=torch.arange(3, 12, device=gpu)[None], output_hidden_states=True)
    before: Picture = picture(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    levers = Levers({}, BLOCKS, True, True)
    with prepared(model, levers, liger="auto") as ready:
        assert model.get_input_embeddings().weight.device.type == "cpu"
        run_on(ready, levers)
    assert changed(before, picture(model)) == []
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
