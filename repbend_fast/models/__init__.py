"""Models: loading, the tapped decoder, the trained adapter."""

from repbend_fast.models.adapters import attach_lora, trainable_parameters
from repbend_fast.models.decoder import Decoder, Head, find_decoder, find_head, run_decoder
from repbend_fast.models.layers.lora import lora_dropout, use_low_rank_forward
from repbend_fast.models.layers.switches import reference_model
from repbend_fast.models.load import load_model, load_tokenizer, quantize_nf4, resolve_device
from repbend_fast.models.surgery import Prepared, prepared

__all__ = [
    "Decoder",
    "Head",
    "Prepared",
    "attach_lora",
    "find_decoder",
    "find_head",
    "load_model",
    "load_tokenizer",
    "lora_dropout",
    "prepared",
    "quantize_nf4",
    "reference_model",
    "resolve_device",
    "run_decoder",
    "trainable_parameters",
    "use_low_rank_forward",
]
