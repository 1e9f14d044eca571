"""A base that one card cannot hold: the frozen weights of its blocks divided among processes by PyTorch's FSDP2.

A block's weights are gathered when it runs, forward or backward, and given up behind it. The adapter, embedding, head
and final norm stay whole in every process: the adapter's gradient is added up as without sharding. Each block is a
root of its own, since a truncated pass runs only some of them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from repbend_fast.models.causal import CausalLM


def shard_blocks(model: CausalLM, blocks: nn.ModuleList, device: torch.device) -> None:
    """Divide the blocks, in place and for good, block by block onto ``device``, and move what stays whole there; a
    second call changes nothing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if any(isinstance(block, FSDPModule) for block in blocks):
        return
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        adapter = {p for p in block.parameters() if p.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)
    cast(nn.Module, model).to(device)


def leave_to_fsdp(model: CausalLM) -> None:
    """Have a ``DistributedDataParallel`` around ``model``, somebody else's, pass over the weights that are divided:
    it would copy the first process's into the others'.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    divided = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(cast(nn.Module, model), divided)
