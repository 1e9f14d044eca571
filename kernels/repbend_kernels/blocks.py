"""What ops and trainers of one's own can be built of: the parts of the ops that are held stable for others."""

from .adapted_linears import AdaptedLinear, AdaptedLinears
from .checks import accumulate_dtype
from .dequantize_nf4 import Nf4Scales, dequantize_nf4, nf4_linear
from .head import default_chunk_rows, head_scratch, hidden_gradient, logits_into
from .keyed_dropout import KeyedMask, row_hashes
from .low_rank import Remake
from .low_rank_sizes import MOST_SHARED_RANK
from .made_linear import made_linear

__all__ = [
    "MOST_SHARED_RANK",
    "AdaptedLinear",
    "AdaptedLinears",
    "KeyedMask",
    "Nf4Scales",
    "Remake",
    "accumulate_dtype",
    "default_chunk_rows",
    "dequantize_nf4",
    "head_scratch",
    "hidden_gradient",
    "logits_into",
    "made_linear",
    "nf4_linear",
    "row_hashes",
]
