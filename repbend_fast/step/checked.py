"""A runner whose model has been shown to be one that can be run so."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from repbend_fast.config import Config
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.load import resolve_device
from repbend_fast.models.surgery import Prepared, prepared
from repbend_fast.step.levers import Levers
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.proof import Proof, prove_model
from repbend_fast.step.runner import StreamRunner


def checked_runner(
    model: CausalLM, config: Config, levers: Levers, uses_head: bool, ranks: Ranks = ALONE
) -> StreamRunner:
    """The runner of a loaded model, prepared for it, under the recipe's autocast, with what passes take for granted
    shown on a few tokens.

    Where packing leaks between sequences and was not asked for, the runner pads. ``runner.prepared.restore()`` gives
    the model back. ``ranks`` in lockstep divide its blocks among them.

    Raises:
        UserError: the head is no plain matrix, or something does not hold (``step.proof``); the model is as before.
    """
    shards = resolve_device(config.model.device) if ranks.lockstep else None
    ready = prepared(model, levers, liger=config.model.liger, shards=shards)
    try:
        autocast = autocast_dtype(config, ready.device)
        runner = StreamRunner(ready, levers, autocast=autocast, uses_head=uses_head, ranks=ranks)
        runner.proof = _proved(ready, runner.parts, levers.packing, config.memory.packing)
    except BaseException:
        ready.restore()
        raise
    packing = runner.proof.packing
    wanted = config.memory.share_beginnings == "auto" and packing == "on" and runner.proof.shares
    runner.levers = replace(levers, packing=packing, share_beginnings="on" if wanted else "off")
    return runner


def _proved(ready: Prepared, parts: ModelParts, packing: Literal["on", "off"], asked: str) -> Proof:
    """The proof of a prepared model; where its rows cannot be packed without a mask, and padding is not better, with
    one.
    """
    masks = packing == "on" and (asked == "on" or ready.device.type != "cuda")
    proof = prove_model(parts, packing, "auto" if masks else asked)
    if masks and proof.packing == "off":
        ready.mask_rows()
        proof = prove_model(parts, packing, asked)
    return proof
