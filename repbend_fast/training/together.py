"""What the processes of one run do together besides the passes: the same run to begin with, and one gradient."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from repbend_fast.config import Config, resolved_yaml
from repbend_fast.distributed.ranks import Ranks
from repbend_fast.errors import UserError
from repbend_fast.runs.prepare import RunData


def check_alike(ranks: Ranks, config: Config, data: RunData) -> None:
    """Refuse processes that would train differently: each reads recipe and records itself, maybe on its own machine.

    Raises:
        UserError: names the first thing that differs.
    """
    sampler = json.dumps(data.sampler.state_dict(), sort_keys=True, default=str)
    own = {
        "configuration": hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
        "records": {role: len(records) for role, records in data.sampler.sets.items()},
        "checkpoint": hashlib.sha256(sampler.encode()).hexdigest(),
    }
    for number, other in enumerate(ranks.gathered(own)):
        for what, value in own.items():
            if other[what] != value:
                raise UserError(
                    f"process {ranks.number} and process {number} have not the same {what}; give all of them the same "
                    "recipe, files and output.folder (on a file system that every machine sees)"
                )


def add_up_gradients(ranks: Ranks, parameters: list[nn.Parameter]) -> None:
    """The whole gradient in each process: the sum of their shares, since each divides by the denominators of the whole
    micro-batch. Once a step, behind its last micro-batch.
    """
    if not ranks.several:
        return
    # One that no process has stays without: the optimizer passes over it.
    known = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
    (anywhere,) = ranks.totals([known])
    wanted = [p for p, count in zip(parameters, anywhere.tolist()) if count]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.total_([p.grad for p in wanted if p.grad is not None])
