"""Head-loss baselines. Each takes the same arguments and returns the same quantity, or is skipped where it cannot run.

Baselines of other projects that need a GPU or a package that is not here raise :class:`Unavailable` with the reason.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 128


class Unavailable(Exception):
    """The baseline cannot run here; the text says why."""


def kl_of_logits(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """T² · Σ_rows KL(softmax(reference/T) ‖ softmax(logits/T)) as the published code takes it, in the logits' dtype."""
    student = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(student, F.softmax(reference / temperature, dim=-1), reduction="sum") * temperature**2


def published_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Full logits of both models in the model's dtype, then ``F.kl_div``."""
    return kl_of_logits(hidden @ weight.T, reference @ weight.T, temperature)


def chunked_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Plain torch in row chunks, each checkpointed, so that one chunk's logits live at a time."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(
            published_kl, hidden[part], reference[part], weight, temperature, use_reentrant=False
        )
    return total


def liger_chunked_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Liger's chunked distillation loss in plain torch with β = 0, which is the forward KL; uncompiled."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"liger_kernel: {error}") from error
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature, compiled=False, chunk_size=CHUNK
    )
    labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return loss(hidden, weight, reference, weight, labels) * (temperature**2 * hidden.shape[0])


def liger_fused_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Liger's Triton fused linear JSD with β = 0, which is the forward KL. From 0.8.5 on its logits are float32."""
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Unavailable(f"liger_kernel: {error}") from error
    if not hidden.is_cuda:
        raise Unavailable("Liger's Triton kernels need a GPU")
    return LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)(hidden, weight, reference, weight, None) * (
        temperature**2 * hidden.shape[0]
    )


def liger_linear_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Liger's fused linear KL. It wants the teacher's probabilities, [N, V], which are made here and so are counted;
    its own logits have the states' dtype.
    """
    try:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    except ImportError as error:
        raise Unavailable(f"liger_kernel: {error}") from error
    if not hidden.is_cuda:
        raise Unavailable("Liger's Triton kernels need a GPU")
    with torch.no_grad():
        # As exact as they can be had: what its loss does to the student's logits is what is compared.
        teacher = torch.mm(reference, weight.T, out_dtype=torch.float32).div_(temperature).softmax(dim=-1)
    return LigerFusedLinearKLDivLoss(reduction="sum", temperature=temperature)(hidden, weight, teacher) * temperature**2


def fla_fused_kl(hidden: Tensor, reference: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """flash-linear-attention's fused KL; it knows no temperature, so the states are divided by it."""
    try:
        from fla.modules import FusedKLDivLoss
    except ImportError as error:
        raise Unavailable(f"flash-linear-attention: {error}") from error
    if not hidden.is_cuda:
        raise Unavailable("flash-linear-attention's Triton kernels need a GPU")
    loss = FusedKLDivLoss()(hidden / temperature, reference / temperature, weight, weight)
    return loss * (temperature**2 * hidden.shape[0])


def published_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Full logits in the model's dtype, float32 log-softmax, gather."""
    return (hidden @ weight.T).float().log_softmax(dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def chunked_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Plain torch in row chunks, each checkpointed."""
    parts = []
    for start in range(0, hidden.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        parts.append(checkpoint(published_log_prob, hidden[part], weight, targets[part], use_reentrant=False))
    return torch.cat(parts)


def liger_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's Triton fused linear cross-entropy, unreduced."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"liger_kernel: {error}") from error
    if not hidden.is_cuda:
        raise Unavailable("Liger's Triton kernels need a GPU")
    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets)
