"""Triton kernels, each under the name of the op that launches it; imported where one is launched, since Triton may be
absent.

``dequantize_nf4``, ``keyed_dropout``, ``linear_kl_div``, ``linear_log_prob``, ``low_rank``, ``low_rank_down``,
``pairwise_cosine``, ``row_distance`` and ``tap_rows`` declare the kernels and the launch parameters that a tool which
compiles them needs; ``parts`` are pieces of more than one kernel, and ``low_rank_launch`` launches those of
``low_rank`` and of ``low_rank_down``.
"""

__all__ = [
    "dequantize_nf4",
    "keyed_dropout",
    "linear_kl_div",
    "linear_log_prob",
    "low_rank",
    "low_rank_down",
    "pairwise_cosine",
    "row_distance",
    "tap_rows",
]
