"""A recipe's model as shapes alone: the product's own model, adapter and NF4 layers on fake tensors, in no memory and
no time.

Fake tensors live on the CPU device, whatever the device that is planned for: autograd on fake CUDA tensors needs a CUDA
build. The CPU's fused attention keeps the same tensors for backward as CUDA's (query, key, value, output, one float per
row and head).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from repbend_fast.config.schema import LoraConfig, ModelConfig
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.adapters import attach_lora, settled_lora
from repbend_fast.models.causal import AdaptedLM, CausalLM, Shape
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.load import (
    DTYPES,
    NF4_BLOCK,
    _hub_arguments,
    config_source,
    keep_attention_cap,
    resolve_source,
)
from repbend_fast.planning import kept
from repbend_fast.planning.published_shapes import PUBLISHED_SHAPES

FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""Of all fake tensors that are made here."""


def model_shape(config: ModelConfig) -> tuple[Shape, str | None]:
    """transformers' configuration of the recipe's model, and a note where it is the bundled table's.

    Raises:
        UserError: no configuration is to be had.
    """
    return _model_shape(config.name, config.gguf_file, config.revision, config.trust_remote_code)


@lru_cache(maxsize=8)
def _model_shape(
    name: str, gguf_file: str | None, revision: str | None, trust_remote_code: bool
) -> tuple[Shape, str | None]:
    from transformers import AutoConfig

    config = ModelConfig(name=name, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code)
    # The table's models are no adapters, which is asked over the network too.
    source = resolve_source(config) if name in PUBLISHED_SHAPES else config_source(config)
    arguments, bundled = _hub_arguments(config), PUBLISHED_SHAPES.get(source)
    try:
        # A gated model's configuration is asked for over the network only where the table has none.
        read = partial(AutoConfig.from_pretrained, source, local_files_only=bundled is not None, **arguments)
        return _kept_shape(Path(source) / gguf_file, read) if gguf_file else read(), None
    except (OSError, ValueError, KeyError) as error:
        if bundled is None:
            raise UserError(
                f"model.name={name}: its configuration cannot be read, which planning needs ({one_line(error)})"
            ) from error
    settings = dict(bundled)
    shape = cast(Shape, AutoConfig.for_model(str(settings.pop("model_type")), **settings))
    return shape, f"{name} is not on this machine: planned with its published shape"


def _kept_shape(file: Path, read: Callable[[], Shape]) -> Shape:
    """The configuration in a GGUF file, which is read with the whole vocabulary: kept where the file lies here."""
    try:
        stat = file.stat()
    except OSError:
        return read()
    key: kept.Json = {
        "versions": kept.versions(),
        "file": [str(file.resolve()), float(stat.st_size), str(stat.st_mtime_ns)],
    }
    known = _made_shape(kept.read("shape", key))
    if known is not None:
        return known
    shape = read()
    settings = cast(kept.Json, shape.to_dict())
    again = _made_shape(settings)
    if again is not None and again.to_dict() == shape.to_dict():
        kept.write("shape", key, settings)
    return shape


def _made_shape(settings: kept.Json) -> Shape | None:
    """The configuration of these settings; None where they are of no type that transformers has."""
    from transformers import AutoConfig

    if not isinstance(settings, dict) or "model_type" not in settings:
        return None
    try:
        return cast(Shape, AutoConfig.for_model(**settings))
    except (ValueError, TypeError):
        return None


def shape_model(config: ModelConfig, lora: LoraConfig, window: tuple[int, ...], blocks: int | None = None) -> AdaptedLM:
    """The recipe's PEFT model on fake tensors.

    Args:
        window: as in ``attach_lora``.
        blocks: keep only the first ``blocks`` decoder blocks; None keeps all.

    Raises:
        UserError: as ``model_shape`` and ``attach_lora``.
    """
    from transformers import AutoModelForCausalLM

    shape, _ = model_shape(config)
    dtype = DTYPES[config.dtype]
    arguments = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, **arguments)
        except (ValueError, ImportError) as error:
            raise UserError(f"model.name={config.name}: cannot be planned ({one_line(error)})") from error
    keep_attention_cap(model, config)
    model.requires_grad_(False).eval()
    decoder = find_decoder(model)
    if blocks is not None:
        # Settled on the whole model: some kinds of block may lie beyond the cut.
        lora = settled_lora(model, lora)
        holder, name = decoder.place
        setattr(holder, name, decoder.layers[:blocks])
        lora = settled_lora(model, lora, of_all=False)
    if config.quantization == "nf4":
        _nf4_layers(model, dtype)
    adapted = attach_lora(model, lora, window)
    _make_fake(adapted, config)
    return adapted


def fake_zeros(like: Tensor) -> Tensor:
    """A fake tensor of the same shape and dtype."""
    with FAKE_MODE:
        return torch.zeros(like.shape, dtype=like.dtype)


def _nf4_layers(model: CausalLM, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for block in find_decoder(model).layers:
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear:
                    has_bias = linear.bias is not None
                    layer = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=has_bias,
                        compute_dtype=dtype,
                        quant_type="nf4",
                        device="meta",
                    )
                    layer.support_avx512bf16_for_cpu = False
                    setattr(parent, name, layer.requires_grad_(False))


def _make_fake(model: CausalLM, config: ModelConfig) -> None:
    """Replace meta tensors by fake ones of the CPU, in place; what was shared stays shared."""
    import bitsandbytes as bnb

    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with FAKE_MODE:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            # The original is kept beside its twin: its id must not be given to another tensor meanwhile.
            made[id(tensor)] = (nn.Parameter(twin, requires_grad=tensor.requires_grad) if parameter else twin), tensor
        return made[id(tensor)][0]

    for module in model.modules():
        packed = isinstance(module, bnb.nn.Linear4bit)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = packed and name == "weight"
                module._parameters[name] = cast(
                    nn.Parameter, _nf4_weight(cast(nn.Linear, module), config) if own else fake(parameter)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _nf4_weight(layer: nn.Linear, config: ModelConfig) -> nn.Parameter:
    """What bitsandbytes' ``Params4bit`` holds, as a plain parameter: half a byte per weight, and the scales, quantised
    too or not.
    """
    from bitsandbytes.functional import QuantState

    count = layer.in_features * layer.out_features
    blocks = -(count // -NF4_BLOCK)
    with FAKE_MODE:
        packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
        code, state2, offset = torch.empty(16), None, None
        if config.double_quantization:
            scales = torch.empty(blocks, dtype=torch.uint8)
            offset = torch.empty(())
            state2 = QuantState(
                torch.empty(-(blocks // -256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
        else:
            scales = torch.empty(blocks)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    shape = torch.Size((layer.out_features, layer.in_features))
    weight.quant_state = QuantState(scales, shape, code, NF4_BLOCK, "nf4", DTYPES[config.dtype], offset, state2)
    weight.compress_statistics, weight.quant_type = config.double_quantization, "nf4"
    return weight
