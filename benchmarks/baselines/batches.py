"""What both step baselines read: a batch's streams as padded tensors, and the rows that a loss mode selects."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.objectives.repbend import RepBendConfig

PROMPT_MODES = ("prompt_last", "prompt_all")


def safe_sequences(batch: Batch, config: RepBendConfig) -> list[Sequence]:
    """Safe prompts with safe answers and, where answers are read, unsafe prompts with safe answers."""
    return list(batch.safe) + ([] if config.loss_mode in PROMPT_MODES else [p.safe for p in batch.pairs])


def unsafe_sequences(batch: Batch) -> list[Sequence]:
    """Unsafe prompts with unsafe answers, from both sources."""
    return [*batch.unsafe, *(p.unsafe for p in batch.pairs)]


def padded(
    sequences: Seq[Sequence], width: int | None = None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T], padded on the right to ``width`` or to the longest sequence.

    Raises:
        ValueError: a sequence is longer than ``width``.
    """
    longest = max(len(s) for s in sequences)
    width = width or longest
    if longest > width:
        raise ValueError(f"a sequence has {longest} tokens, more than the width {width}")
    ids = torch.tensor([(*s.ids, *[0] * (width - len(s))) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


def row_mask(
    sequences: Seq[Sequence], mode: str, width: int | None = None, device: torch.device | None = None
) -> Tensor:
    """The rows that ``loss_mode`` selects, bool [B, T]."""
    chosen = torch.zeros(len(sequences), width or max(len(s) for s in sequences), dtype=torch.bool)
    for i, s in enumerate(sequences):
        first = {
            "prompt_last": s.prompt_length - 1,
            "prompt_all": 0,
            "prompt_response": 0,
            "response_all": s.prompt_length,
        }[mode]
        chosen[i, first : s.prompt_length if mode in PROMPT_MODES else len(s)] = True
    return chosen.to(device)


def unsafe_row_mask(
    batch: Batch, config: RepBendConfig, width: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Rows of U; with ``published_quirks`` and ``prompt_last`` those of the first B sequences only, as the published
    code has it.
    """
    rows = row_mask(unsafe_sequences(batch), config.loss_mode, width, device)
    if config.published_quirks and config.loss_mode == "prompt_last":
        rows[len(batch.unsafe) :] = False
    return rows


def prompt_states(hidden: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """The states at the last prompt tokens: [..., B, T, D] to [..., B, D]."""
    positions = torch.tensor([s.prompt_length - 1 for s in sequences], device=hidden.device)
    return hidden[..., torch.arange(len(sequences), device=hidden.device), positions, :]


def kl_count(sequences: Seq[Sequence], config: RepBendConfig) -> int:
    """What the summed KL is divided by: sequences or tokens."""
    return len(sequences) if config.kl_reduction == "sequence" else sum(len(s) for s in sequences)


def weights(config: RepBendConfig) -> dict[str, float]:
    """The weight of each term in the total loss: α·S − β·U + γ·C + ε·K + η·P."""
    return {
        "safe": config.safe,
        "unsafe": -config.unsafe,
        "cosine": config.cosine,
        "kl": config.kl,
        "pair": config.pair,
    }


def weighted_sum(terms: dict[str, Tensor], config: RepBendConfig) -> Tensor:
    """The total loss of the given terms."""
    return torch.stack([weights(config)[name] * value for name, value in terms.items()]).sum()
