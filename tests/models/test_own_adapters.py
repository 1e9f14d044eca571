"""A user's own adapter of any kind: merged whole, in each of the ways it may come, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from kernel_compare import relative_l2
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, objective_config, run_step, tiny_model, wrap
from torch import Tensor

from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import load_model, quantize_nf4, reference_model
from repbend_fast.models.merge import put_adapter

IDS = torch.arange(3, VOCABULARY).view(1, -1)
LINEAR = ["q_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]


def _lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 2, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | settings))


KINDS: dict[str, Callable[[], Any]] = {
    "lora": _lora,
    "dora": lambda: _lora(use_dora=True),
    "rslora": lambda: _lora(use_rslora=True, r=4),
    "bias": lambda: _lora(bias="all"),
    "embedding": lambda: _lora(target_modules=["embed_tokens", "q_proj"]),
    "saved head": lambda: _lora(modules_to_save=["lm_head"]),
    "saved embedding and norm": lambda: _lora(modules_to_save=["embed_tokens", "norm"]),
    "lora and tokens": lambda: _lora(trainable_token_indices=[5, 9]),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[4, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=NORMS, task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=True, task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
WAYS = ["model.adapter", "folder", "beside", "hub"]


def _noise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def _logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _load(name: Path | str, **settings: Any) -> Any:
    return load_model(ModelConfig(**({"name": str(name), "dtype": "float32", "device": "cpu"} | settings)))


@pytest.fixture(scope="module", params=["llama", "qwen3"], ids=["own head", "tied head"])
def base(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    return folder


def _adapter(base: Path, folder: Path, kind: Any) -> Tensor:
    """Save a trained adapter of a kind, with its base's name; PEFT's own logits of base + adapter, read back."""
    model = peft.get_peft_model(_load(base), kind)
    _noise(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return _logits(peft.PeftModel.from_pretrained(_load(base), folder).eval())


def _arrange(way: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """The settings that name base and adapter in one of the ways."""
    if way == "model.adapter":
        return {"name": base, "adapter": str(adapter)}
    if way == "folder":
        return {"name": adapter}
    if way == "beside":
        together = tmp_path / "together"
        shutil.copytree(base, together)
        for path in adapter.iterdir():
            shutil.copy(path, together)
        return {"name": together}
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--adapter" / "snapshots" / ("a" * 40)
    shutil.copytree(adapter, snapshot)
    (cache / "models--org--adapter" / "refs").mkdir()
    (cache / "models--org--adapter" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return {"name": "org/adapter"}


def _check(base: Path, kind: str, way: str, tmp_path: Path, monkeypatch) -> None:
    expected = _adapter(base, tmp_path / "adapter", KINDS[kind]())
    model = _load(**_arrange(way, base, tmp_path / "adapter", tmp_path, monkeypatch))
    assert relative_l2(_logits(_load(base)), expected) > 1e-3
    assert relative_l2(_logits(model), expected) < 1e-5
    assert not any("peft" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_merged_as_peft_applies_it(base, tmp_path, monkeypatch, kind) -> None:
    _check(base, kind, WAYS[list(KINDS).index(kind) % len(WAYS)], tmp_path, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["saved head", "lora and tokens"])
def test_all_of_it_is_merged_in_whatever_way_it_comes(llama, tmp_path, monkeypatch, kind, way) -> None:
    _check(llama, kind, way, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["saved head", "saved embedding and norm", "tokens", "dora"])
def test_nothing_of_it_is_switched_off_in_the_reference(llama, tmp_path, monkeypatch, kind) -> None:
    """At LoRA's start the distances to the reference are exactly 0, and the reference is the model with the adapter."""
    expected = _adapter(llama, tmp_path / "adapter", KINDS[kind]())
    model = wrap(_load(**_arrange("beside", llama, tmp_path / "adapter", tmp_path, monkeypatch)), trained=False)
    results, _ = run_step(model, objective_config(cosine=0.1))
    terms = {name: float(value) for result in results.values() for name, value in result.terms.items()}
    assert {name: terms[name] for name in ("safe", "unsafe", "kl")} == {"safe": 0.0, "unsafe": 0.0, "kl": 0.0}
    with reference_model(model):
        assert relative_l2(_logits(model), expected) < 1e-5


@pytest.mark.parametrize("way", ["model.adapter", "beside"])
def test_saved_modules_under_nf4(llama, tmp_path, monkeypatch, way) -> None:
    _adapter(llama, tmp_path / "adapter", KINDS["saved embedding and norm"]())
    settings = _arrange(way, llama, tmp_path / "adapter", tmp_path, monkeypatch)
    merged = _load(**settings)
    quantize_nf4(merged, torch.float32, True, torch.device("cpu"))
    assert torch.equal(_logits(_load(**settings, quantization="nf4")), _logits(merged))


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None], ids=["modules_to_save", "embedding saved along"])
@pytest.mark.parametrize("way", ["model.adapter", "beside"])
def test_an_adapter_that_brings_tokens_of_its_own(base, tmp_path, monkeypatch, way, saved) -> None:
    """Its embedding and head have more rows than the model's."""
    larger = _load(base)
    larger.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    larger.get_input_embeddings().weight.data[-3:] += 0.3
    model = peft.get_peft_model(larger, _lora(modules_to_save=saved))
    _noise(model)
    ids = torch.arange(3, VOCABULARY + 3).view(1, -1)
    expected = _logits(model.eval(), ids)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = _load(**_arrange(way, base, tmp_path / "adapter", tmp_path, monkeypatch))
    assert relative_l2(_logits(loaded, ids), expected) < 1e-5


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(("kind", "way"), [*zip(PROMPTS, WAYS, strict=True), ("prompt tuning", "beside")])
def test_adapters_that_no_weights_hold_are_refused_in_one_line(llama, tmp_path, monkeypatch, kind, way) -> None:
    model = peft.get_peft_model(_load(llama), PROMPTS[kind]())
    model.peft_config["default"].base_model_name_or_path = str(llama)
    model.save_pretrained(tmp_path / "adapter")
    settings = _arrange(way, llama, tmp_path / "adapter", tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        _load(**settings)
    message = str(caught.value)
    assert f"an adapter of kind {kind} " in message
    assert message.startswith("model.adapter=" if way == "model.adapter" else "model.name=")
    assert "name a model without it" in message
    assert "\n" not in message


def test_a_base_may_bring_an_adapter_of_its_own(llama, tmp_path, monkeypatch) -> None:
    """An adapter's folder names a folder with a model and an adapter: both are merged, the base's first."""
    _adapter(llama, tmp_path / "adapter", KINDS["ia3"]())
    together = Path(_arrange("beside", llama, tmp_path / "adapter", tmp_path, monkeypatch)["name"])
    expected = _adapter(together, tmp_path / "second", KINDS["lora"]())
    assert relative_l2(_logits(_load(tmp_path / "second")), expected) < 1e-5


def test_an_adapter_that_is_its_own_base(llama, tmp_path) -> None:
    _adapter(llama, tmp_path / "adapter", KINDS["lora"]())
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "adapter")})
    )
    with pytest.raises(UserError, match="is its own base"):
        _load(tmp_path / "adapter")


def test_tensors_without_a_place_are_named(llama, tmp_path) -> None:
    _adapter(llama, tmp_path / "adapter", _lora(modules_to_save=["lm_head"]))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights) | {"base_model.model.model.extra_norm.weight": torch.ones(64)}
    save_file(tensors, weights)
    with pytest.raises(
        UserError, match=r"1 of its tensors have no place here, base_model\.model\.model\.extra_norm\.weight"
    ):
        _load(llama, adapter=str(tmp_path / "adapter"))


def test_an_untied_head_is_exported_untied(tmp_path, monkeypatch) -> None:
    """A saved head over a tied embedding: saved and read again, the model is the same."""
    base = tmp_path / "base"
    tiny_model("qwen3").save_pretrained(base)
    expected = _adapter(base, tmp_path / "adapter", KINDS["saved head"]())
    _load(base, adapter=str(tmp_path / "adapter")).save_pretrained(tmp_path / "merged")
    assert relative_l2(_logits(_load(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "saved embedding and norm", "lora and tokens", "ia3"])
def test_unmerged_it_is_applied_as_peft_does_and_frozen(base: Path, kind: str, tmp_path: Path) -> None:
    expected = _adapter(base, tmp_path / "adapter", KINDS[kind]())
    model = _load(base)
    adapted = put_adapter(model, str(tmp_path / "adapter"), "--adapter")
    assert torch.equal(_logits(adapted), expected)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert not adapted.training


def test_unmerged_it_is_refused_as_a_merged_one_is(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter=.*none: cannot be applied to this model"):
        put_adapter(_load(base), str(tmp_path / "none"), "--adapter")


def test_a_setting_of_a_setting_that_peft_does_not_know(llama: Path, tmp_path: Path) -> None:
    _adapter(llama, tmp_path / "adapter", KINDS["lora"]())
    config = tmp_path / "adapter" / "adapter_config.json"
    newer = {"monteclora_config": {"of_a_later_version": 1}, "also_later": 2}
    config.write_text(json.dumps(json.loads(config.read_text()) | newer))
    with pytest.raises(UserError, match=r"inside of one in its adapter_config.json is unknown to PEFT"):
        _load(llama, adapter=str(tmp_path / "adapter"))
