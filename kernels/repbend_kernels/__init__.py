"""Fused loss ops for representation-level training: distances of hidden states, and head losses in row chunks.

Needs torch; uses Triton where it is installed. Every op is one function:

    bend_tap, tap_rows            read the residual stream in place and put a loss's gradient in there
    bend_distance                 distance of selected rows to a reference, an ordinary loss
    window_distance               the same over a window of layers and a token mask
    pairwise_cosine               how far a batch's states point apart
    linear_kl_div                 KL divergence from hidden states and the head
    linear_log_prob               log-probabilities from hidden states and the head
    keyed_dropout                 dropout whose mask follows a key of each row, whatever the batch it lies in

``set_implementation`` chooses between ``auto``, ``torch``, ``triton`` and ``eager``; ``oracles`` has the eager expressions.
"""

from . import oracles
from .bend_distance import bend_distance
from .bend_tap import bend_tap
from .checks import KINDS
from .keyed_dropout import keyed_dropout
from .linear_kl_div import linear_kl_div
from .linear_log_prob import linear_log_prob
from .pairwise_cosine import pairwise_cosine
from .selection import get_implementation, implementation, set_debug, set_implementation
from .tap_rows import tap_rows
from .window_distance import window_distance

__all__ = [
    "KINDS",
    "bend_distance",
    "bend_tap",
    "get_implementation",
    "implementation",
    "keyed_dropout",
    "linear_kl_div",
    "linear_log_prob",
    "oracles",
    "pairwise_cosine",
    "set_debug",
    "set_implementation",
    "tap_rows",
    "window_distance",
]
