"""Fused ops for representation-level training: distances of hidden states, head losses in row chunks, and lean layers.

Needs torch; uses Triton where it is installed. Every op is one function:

    bend_tap, tap_rows            read the residual stream in place and put a loss's gradient in there
    triplet_tap, triplet_sums     the same for triplets around the mean of a batch's unsafe states
    bend_distance                 distance of selected rows to a reference, an ordinary loss
    window_distance               the same over a window of layers and a token mask
    pairwise_cosine               how far a batch's states point apart
    linear_kl_div                 KL divergence from hidden states and the head
    linear_log_prob               log-probabilities from hidden states and the head
    linear_lowered_label          cross-entropy to a distribution with a less likely label
    keyed_dropout                 dropout whose mask follows a key of each row, whatever the batch it lies in
    lora_down, lora_up            the low-rank part of an adapted layer, with that dropout
    rms_norm, gated_product       a norm and a gate that keep only their inputs for backward

``set_implementation`` chooses between ``auto``, ``torch``, ``triton`` and ``eager``; ``oracles`` has the eager
expressions, ``blocks`` what other ops can be built of, ``scratch`` the memory that each op takes inside.
"""

from . import blocks, oracles, scratch
from .bend_distance import bend_distance
from .bend_tap import bend_tap
from .checks import KINDS
from .gated_product import Activation, gated_product
from .keyed_dropout import keyed_dropout
from .linear_kl_div import linear_kl_div
from .linear_log_prob import linear_log_prob
from .linear_lowered_label import linear_lowered_label
from .low_rank import lora_down, lora_up
from .pairwise_cosine import pairwise_cosine
from .rms_norm import rms_norm
from .selection import IMPLEMENTATIONS, get_implementation, implementation, resolve, set_debug, set_implementation
from .tap_rows import tap_rows
from .triplet_tap import TripletSums, triplet_sums, triplet_tap
from .window_distance import window_distance

__all__ = [
    "IMPLEMENTATIONS",
    "KINDS",
    "Activation",
    "TripletSums",
    "bend_distance",
    "bend_tap",
    "blocks",
    "gated_product",
    "get_implementation",
    "implementation",
    "keyed_dropout",
    "linear_kl_div",
    "linear_log_prob",
    "linear_lowered_label",
    "lora_down",
    "lora_up",
    "oracles",
    "pairwise_cosine",
    "resolve",
    "rms_norm",
    "scratch",
    "set_debug",
    "set_implementation",
    "tap_rows",
    "triplet_sums",
    "triplet_tap",
    "window_distance",
]
