"""Greedy decoding of one batch through transformers' ``generate``: the prompts' common beginning runs once, and rows
whose answers have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from repbend_fast.evaluation.kv_cache import in_room, padding_is_unseen, roomy_cache, rows_can_leave
from repbend_fast.models.causal import CausalLM

# Tokens that a common beginning must spare to be worth a pass of its own.
WORTH_A_PASS = 256
# Rows that a batch has at least for its ended ones to leave: a decoding step costs nearly the same for fewer.
ROWS_WORTH_LEAVING = 8


class _HalfEnded(StoppingCriteria):
    """Stops all rows once half of them have ended."""

    def __init__(self, start: int, ends: Tensor) -> None:
        self._start, self._ends = start, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        ended = torch.isin(input_ids[:, self._start :], self._ends).any(dim=1)
        return (ended.sum() * 2 >= len(ended)).expand(len(ended))


def new_tokens(model: CausalLM, encoded: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """The ids that each of ``encoded`` is continued with, its end included, by the model's ``generation_config``
    (greedy, ``max_new_tokens``, ``pad_token_id``). What stands behind a row's end means nothing.
    """
    settings = model.generation_config
    left: int = settings.max_new_tokens
    cache = roomy_cache(model, max(map(len, encoded)) + left)
    shared = _run_once(model, encoded, cache, device)
    ids, mask = padded(encoded, settings.pad_token_id, shared)
    ids, mask = ids.to(device), mask.to(device)
    ends = torch.tensor(settings.eos_token_id or [], dtype=torch.long, device=device)
    rows, found = list(range(len(encoded))), [list[int]() for _ in encoded]
    while True:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=left,
            **in_room(cache),
            **_leaving(cache, ids, ends),
        )
        fresh = out[:, ids.shape[1] :]
        for row, tokens in zip(rows, fresh.tolist(), strict=True):
            found[row] += tokens
        going = (~torch.isin(fresh, ends).any(dim=1)).nonzero()[:, 0]
        left -= fresh.shape[1]
        if cache is None or not left or not len(going):
            return found
        cache.batch_select_indices(going)
        rows = [rows[i] for i in going.tolist()]
        ids, mask = out[going], torch.cat([mask, torch.ones_like(fresh)], dim=1)[going]


def padded(encoded: Sequence[Sequence[int]], pad: int, shared: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, longest] and mask [B, longest] of rows that end at one position. The padding stands behind the first
    ``shared`` tokens, which are the same in all.
    """
    longest = max(map(len, encoded))
    ids = torch.full((len(encoded), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(encoded):
        start = longest - len(sequence) + shared
        ids[row, :shared] = torch.tensor(sequence[:shared])
        ids[row, start:] = torch.tensor(sequence[shared:])
        mask[row, :shared] = 1
        mask[row, start:] = 1
    return ids, mask


def _run_once(
    model: CausalLM, encoded: Sequence[Sequence[int]], cache: DynamicCache | None, device: torch.device
) -> int:
    """Puts the keys and values of the rows' common beginning into ``cache``, for all of them, and returns its length.

    0 where it would spare too little, or where the model would see padding between it and the rest.
    """
    shared = common_beginning(encoded)
    if cache is None or shared * (len(encoded) - 1) < WORTH_A_PASS or not padding_is_unseen(model, cache):
        return 0
    beginning = torch.tensor([list(encoded[0][:shared])], device=device)
    model.get_decoder()(input_ids=beginning, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(encoded))
    return shared


def common_beginning(encoded: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with; each row keeps one of its own."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*encoded))
    return min(sum(1 for _ in same), min(map(len, encoded)) - 1)


def _leaving(cache: DynamicCache | None, ids: Tensor, ends: Tensor) -> dict[str, object]:
    """What makes ``generate`` stop so that rows can leave; nothing where they cannot, or where few are left."""
    if cache is None or len(ids) < ROWS_WORTH_LEAVING or not rows_can_leave(cache):
        return {}
    return {"stopping_criteria": StoppingCriteriaList([_HalfEnded(ids.shape[1], ends)])}
