"""What ops and trainers of one's own can be built of: the parts of the ops that are held stable for others."""

from .checks import accumulate_dtype
from .head import default_chunk_rows, head_scratch, hidden_gradient, logits_into
from .keyed_dropout import KeyedMask, row_hashes

__all__ = [
    "KeyedMask",
    "accumulate_dtype",
    "default_chunk_rows",
    "head_scratch",
    "hidden_gradient",
    "logits_into",
    "row_hashes",
]
