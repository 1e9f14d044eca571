"""Steps that train what is left of the adapter after rounding: every n-th runs on merged weights rounded to NF4.

    L_n = L with h from Q(W + s·BA) and r from Q(W),    step number divisible by ``training.nf4_every``

An option of ours, unpublished. A distance then is what the adapter does to the rounded model, not what rounding does;
validation and the other steps see the weights as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from repbend_fast.config.schema import Config
from repbend_fast.models.layers.rounded import Place, nf4
from repbend_fast.models.layers.rounded_passes import rounded_passes
from repbend_fast.step.runner import StreamRunner


def is_rounded(config: Config, number: int) -> bool:
    """Whether step ``number``, counted from 1, runs on rounded weights."""
    every = config.training.nf4_every
    return every is not None and number % every == 0


def weights_of_step(config: Config, number: int, runner: StreamRunner) -> AbstractContextManager[None]:
    """A context for the passes of step ``number``: on rounded weights where it is one of those."""
    if not is_rounded(config, number):
        return nullcontext()
    return rounded_passes(runner.decoder.layers, partial(_to_nf4, config.model.double_quantization))


def _to_nf4(double_quantization: bool, weight: Tensor, place: Place) -> Tensor:
    del place  # every layer has the same format
    return nf4(weight, double_quantization)
