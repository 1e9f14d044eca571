"""Estimates bound what a pass makes, without wasting a budget; chunks halve when memory runs out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from attacked_models import attacked_model, peak_beyond

from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.room import PassCost, fitting
from repbend_fast.evaluation.attacks.scores import last_logits, log_probs
from repbend_fast.evaluation.halving import Chunks
from repbend_fast.models.perturbation import visiting

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize(("tokens", "kept"), [(20, 4), (150, 30)])
def test_estimates_bound_what_a_pass_makes(family: str, dtype: torch.dtype, tokens: int, kept: int) -> None:
    model = attacked_model(family, dtype)
    cost, ids = PassCost.of(model), torch.randint(3, 390, (1, tokens))
    embedded = model.get_input_embeddings()(ids)

    def forward() -> None:
        with torch.no_grad():
            log_probs(last_logits(model, kept, inputs_embeds=embedded, use_cache=True), ids[:, :kept])

    def backward(recompute: bool) -> None:
        leaf = embedded.detach().float().requires_grad_()
        with visiting(model, lambda _, hidden: hidden, recompute=True) if recompute else nullcontext():
            logits = last_logits(model, kept, inputs_embeds=leaf.to(dtype), use_cache=False)
            torch.autograd.grad(log_probs(logits, ids[:, :kept]).mean(), leaf)

    for made, estimate in (
        (peak_beyond(model, forward), cost.forward(tokens, kept)),
        (peak_beyond(model, lambda: backward(False)), cost.backward(tokens, kept)),
        (peak_beyond(model, lambda: backward(True)), cost.backward(tokens, kept, recompute=True)),
    ):
        assert made <= estimate <= 4 * made


def test_what_fits() -> None:
    assert fitting(None, 10**12, 512, "x") == 512
    assert fitting(100, 30, 512, "x") == 3
    assert fitting(100, 30, 2, "x") == 2
    with pytest.raises(UserError, match=r"gcg needs about 3\.0 MiB and the budget is 2\.0 MiB; raise memory\.budget"):
        fitting(2 << 20, 3 << 20, 1, "gcg")


def test_chunks_halve_for_good_and_say_when_nothing_is_left() -> None:
    chunks, seen = Chunks(8, CPU, "gcg"), []

    def work(chosen: slice) -> list[int]:
        seen.append(chosen.stop - chosen.start)
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(range(chosen.start, chosen.stop))

    assert [i for part in chunks.over(5, work) for i in part] == [0, 1, 2, 3, 4]
    assert chunks.over(3, work) == [[0, 1], [2]]
    assert seen == [5, 2, 2, 1, 2, 1]

    def never(_: slice) -> None:
        raise MemoryError("all is full")

    with pytest.raises(UserError, match=r"out of memory in gcg \(all is full\)"):
        chunks.over(1, never)
    with pytest.raises(ZeroDivisionError):
        chunks.over(1, lambda _: 1 // 0)
