"""Loading: what is read, how it arrives, and one clear line for everything that a user can get wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_compare import relative_l2
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, VOCABULARY, objective_config, run_step, tiny_model, wrap
from torch import Tensor

from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import load_model, load_tokenizer, quantize_nf4, reference_model, resolve_device
from repbend_fast.models.load import keep_attention_cap, settle_device

IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _load(name: Path | str, **settings: Any) -> Any:
    return load_model(ModelConfig(**({"name": str(name), "dtype": "float32", "device": "cpu"} | settings)))


def _message(name: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        _load(name, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def own_adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An adapter that a user trained before, in PEFT's format, and the logits of base + adapter."""
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        _load(folder), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(str(path))
    return path, _logits(model.eval())


def test_weights_arrive_frozen_in_eval_mode(folder) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        model = _load(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert torch.equal(_logits(_load(folder)), _logits(tiny_model()))


def test_missing_folder_and_unknown_device(folder, tmp_path) -> None:
    missing = tmp_path / "none"
    assert str(missing) in _message(missing)
    assert "no such folder" in _message(missing)
    assert "cannot be loaded" in _message("nobody/no-such-model")
    for device in ("warp", "cuda:99", "cuda" if not torch.cuda.is_available() else "warp"):
        assert f"model.device={device}" in _message(folder, device=device)
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_pickled_weights_are_refused(folder, tmp_path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    message = _message(tmp_path)
    assert "safetensors" in message
    assert "model.name" in message


@pytest.mark.parametrize("damage", ["cut", "empty", "config", "no config", "unknown type"])
def test_damaged_folders(folder, tmp_path, damage) -> None:
    target = tmp_path / "damaged"
    shutil.copytree(folder, target)
    weights, config = target / "model.safetensors", target / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "config":
        config.write_text('{"model_type": ')
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text('{"model_type": "no_such_type"}')
    assert str(target) in _message(target)


def test_missing_gguf_file(folder) -> None:
    assert _message(folder, gguf_file="model.gguf") == f"model.gguf_file=model.gguf: no such file in {folder}"


@pytest.mark.parametrize("package", ["no_such_package", "no_such.package", "", "json.decoder"])
def test_missing_package(package) -> None:
    assert f"model.name=package:{package}" in _message(f"package:{package}")


def test_a_model_inside_a_package_is_found_without_importing_it(folder, tmp_path, monkeypatch) -> None:
    package = tmp_path / "carries_a_model"
    shutil.copytree(folder, package)
    (package / "__init__.py").write_text("raise ImportError('needs something that is not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(_logits(_load("package:carries_a_model")), _logits(tiny_model()))
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("asked", [False, True])
def test_remote_code_is_run_only_when_asked_for(folder, monkeypatch, asked) -> None:
    import transformers

    passed: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        passed.append(kwargs["trust_remote_code"])
        raise OSError("stop")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", record)
    settings = {"trust_remote_code": True} if asked else {}
    _message(folder, **settings)
    with pytest.raises(UserError):
        load_tokenizer(ModelConfig(name=str(folder), **settings))
    assert passed == [asked, asked]


def test_code_in_a_folder_does_not_run(folder, tmp_path) -> None:
    target = tmp_path / "code"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert str(target) in _message(target)
    assert not (tmp_path / "ran").exists()


def _reference_logits(base: Any) -> Tensor:
    model = wrap(base)
    with reference_model(model):
        reference = _logits(model)
    assert not torch.allclose(reference, _logits(model), atol=1e-3)
    return reference


@pytest.mark.parametrize("way", ["model.adapter", "bare folder", "beside the base", "beside the base, and another"])
def test_the_reference_keeps_the_users_own_adapter(folder, own_adapter, tmp_path, way) -> None:
    path, expected = own_adapter
    together = tmp_path / "together"
    if way.startswith("beside"):
        shutil.copytree(folder, together)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(path / file, together)
    if way == "model.adapter":
        base = _load(folder, adapter=str(path))
    elif way == "bare folder":
        base = _load(path)
    elif way == "beside the base":
        base = _load(together)
    else:
        base = _load(together, adapter=str(path))
        expected = _logits(_load(_doubled(path, tmp_path), adapter=None))
    assert not [n for n, _ in base.named_parameters() if "lora" in n]
    assert not any(p.requires_grad for p in base.parameters())
    assert not torch.allclose(expected, _logits(tiny_model()), atol=1e-2)
    assert torch.allclose(_reference_logits(base), expected, atol=1e-4)


def _doubled(path: Path, tmp_path: Path) -> Path:
    twice = tmp_path / "twice"
    shutil.copytree(path, twice)
    config = json.loads((twice / "adapter_config.json").read_text())
    (twice / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    return twice


@pytest.mark.parametrize("beside", [False, True], ids=["model.adapter", "beside the base"])
def test_own_adapter_under_nf4(folder, own_adapter, tmp_path, beside) -> None:
    """The adapter is merged before quantising: the 4-bit weights are those of base + adapter."""
    path, expected = own_adapter
    if beside:
        together = tmp_path / "together"
        shutil.copytree(folder, together)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(path / file, together)
        quantized = _load(together, quantization="nf4")
    else:
        quantized = _load(folder, adapter=str(path), quantization="nf4")
    merged = _load(folder, adapter=str(path))
    quantize_nf4(merged, torch.float32, True, CPU)
    assert torch.equal(_logits(quantized), _logits(merged))
    assert not torch.equal(_logits(quantized), expected)


def test_adapters_that_cannot_be_used(folder, own_adapter, tmp_path) -> None:
    path, _ = own_adapter
    assert "model.adapter" in _message(folder, adapter=str(tmp_path / "none"))
    target = tmp_path / "pickled"
    shutil.copytree(path, target)
    (target / "adapter_model.safetensors").unlink()
    assert "safetensors" in _message(folder, adapter=str(target))
    target = tmp_path / "nameless"
    shutil.copytree(path, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "names no base model" in _message(target)
    (target / "adapter_config.json").write_text("{")
    assert str(target) in _message(target)
    other = tmp_path / "other"
    model = tiny_model()
    model.config.num_hidden_layers = 2
    model.model.layers = model.model.layers[:2]
    model.save_pretrained(other)
    assert "model.adapter" in _message(other, adapter=str(path))


@pytest.mark.parametrize("double", [True, False])
def test_in_place_nf4_equals_transformers_nf4(folder, double) -> None:
    import bitsandbytes as bnb

    loaded = _load(folder, quantization="nf4", double_quantization=double)
    in_place = _load(folder)
    quantize_nf4(in_place, torch.float32, double, CPU)
    pairs = [
        (a, b)
        for (_, a), (_, b) in zip(loaded.named_modules(), in_place.named_modules())
        if isinstance(a, bnb.nn.Linear4bit)
    ]
    assert len(pairs) == 7 * len(loaded.model.layers)
    for a, b in pairs:
        assert isinstance(b, bnb.nn.Linear4bit)
        assert a.weight.quant_state.nested == double
        assert torch.equal(
            bnb.functional.dequantize_4bit(a.weight.data, a.weight.quant_state),
            bnb.functional.dequantize_4bit(b.weight.data, b.weight.quant_state),
        )
    assert torch.equal(_logits(loaded), _logits(in_place))
    assert type(loaded.lm_head) is type(in_place.lm_head) is torch.nn.Linear
    # Packed for inference, which some processors' kernels do at the first pass, a layer rounds differently and has no
    # gradient.
    for layer in (layer for pair in pairs for layer in pair):
        assert not layer.support_avx512bf16_for_cpu
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    layer, exact = loaded.model.layers[1].mlp.down_proj, tiny_model().model.layers[1].mlp.down_proj.weight
    error = relative_l2(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), exact)
    assert 0.02 < error < 0.12


def test_nf4_widths_that_the_cpu_gets_wrong_are_refused(tmp_path) -> None:
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path)
    message = _message(tmp_path, quantization="nf4")
    assert "model.layers.0.mlp.down_proj has 96 inputs" in message
    with pytest.raises(UserError, match="multiple of 64"):
        quantize_nf4(model, torch.float32, True, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_nf4(family) -> None:
    base = tiny_model(family)
    quantize_nf4(base, torch.float32, True, CPU)
    _, got = run_step(wrap(base), objective_config())
    assert all(torch.isfinite(g).all() for g in got.values())
    assert all(g.abs().max() > 0 for g in got.values())


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ 'own' }}"
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_is_settled_before_a_model_runs_on_it(monkeypatch, name) -> None:
    """Its index is made current, and cuDNN's attention, which plans the reference and the adapted pass
    apart, is off.
    """
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device.index))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    settle_device(CPU)
    assert calls == []
    settle_device(torch.device(name))
    assert calls == ([False] if name == "cuda" else [1, False])


def _gemma2() -> Any:
    model = tiny_model("gemma2")
    model.config.attn_logit_softcapping = 0.05
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05
    return model


def _with_sdpa(model: Any) -> Any:
    """As transformers loads Gemma-2 in the versions that take its SDPA for complete."""
    model.config._attn_implementation = "sdpa"
    return model


def test_attention_logits_keep_their_cap() -> None:
    capped = _gemma2()
    capped.set_attn_implementation("eager")
    expected = _logits(capped)
    automatic = ModelConfig(name="any")
    model = _with_sdpa(_gemma2())
    keep_attention_cap(model, automatic)
    assert relative_l2(_logits(model), expected) < 1e-6
    with pytest.raises(UserError, match=r"model\.attention=sdpa: gemma2.*eager"):
        keep_attention_cap(_with_sdpa(model), ModelConfig(name="any", attention="sdpa"))
    uncapped = _with_sdpa(tiny_model("llama"))
    keep_attention_cap(uncapped, automatic)
    assert uncapped.config._attn_implementation == "sdpa"


def test_tokenizer_and_chat_template(tokenizer_folder, tmp_path) -> None:
    name = str(tokenizer_folder)
    tokenizer = load_tokenizer(ModelConfig(name=name))
    assert tokenizer.chat_template == "{{ 'own' }}"
    assert tokenizer.pad_token == "</s>"
    template = tmp_path / "other.jinja"
    template.write_text("{{ 'other ä' }}", encoding="utf-8")
    assert load_tokenizer(ModelConfig(name=name, chat_template=str(template))).chat_template == "{{ 'other ä' }}"
    with pytest.raises(UserError, match=r"model\.chat_template"):
        load_tokenizer(ModelConfig(name=name, chat_template=str(tmp_path / "none.jinja")))
    template.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"model\.chat_template"):
        load_tokenizer(ModelConfig(name=name, chat_template=str(template)))
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
