"""The losses of the baselines written plainly from their equations: one graph, hidden states of every layer, full
logits, right padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.objectives.ce_u import CEUConfig
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.rmu import RMUConfig
from repbend_fast.objectives.sat_imp import AscentConfig
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.simnpo import SimNPOConfig
from repbend_fast.objectives.undial import UNDIALConfig
from repbend_fast.objectives.x_boundary import XBoundaryConfig


class Passes:
    """Hidden states [L+1, B, T, D] and logits of some sequences, adapted (``h``, ``z``) and reference (``r``,
    ``z_ref``).
    """

    def __init__(self, model: Any, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.width = max(len(s) for s in sequences)
        self.ids = torch.tensor([(*s.ids, *[0] * (self.width - len(s))) for s in sequences])
        self.real = torch.tensor([[True] * len(s) + [False] * (self.width - len(s)) for s in sequences])
        self.h, self.z = self._run(model)
        with torch.no_grad(), model.disable_adapter():
            self.r, self.z_ref = self._run(model)

    def _run(self, model: Any) -> tuple[Tensor, Tensor]:
        output = model(input_ids=self.ids, attention_mask=self.real.long(), output_hidden_states=True, use_cache=False)
        return torch.stack(output.hidden_states), output.logits

    def answers(self) -> Tensor:
        """Mask of the answers' tokens, and of the earlier turns' where the sequences have some."""
        return torch.tensor([[t in self.answered(s) for t in range(self.width)] for s in self.sequences])

    def answered(self, s: Sequence) -> list[int]:
        """Positions of a sequence's answer and earlier turns."""
        starts, stops = (*s.earlier[::2], s.prompt_length), (*s.earlier[1::2], len(s))
        return [t for t in range(len(s)) if any(a <= t < b for a, b in zip(starts, stops, strict=True))]

    def nll(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """NLL per sequence over the answer tokens that have a predecessor, and how many tokens these are."""
        values, tokens = [], []
        for i, s in enumerate(self.sequences):
            targets = [t for t in self.answered(s) if t]
            values.append(
                sum((F.cross_entropy(logits[i, t - 1], self.ids[i, t]) for t in targets), start=logits.new_zeros(()))
            )
            tokens.append(len(targets))
        return torch.stack(values), torch.tensor(tokens)

    def kl(self, rows: Tensor, temperature: float) -> Tensor:
        """T² Σ KL over the rows of a mask."""
        q, p = ((x / temperature).log_softmax(-1) for x in (self.z, self.z_ref))
        return ((p.exp() * (p - q)).sum(-1) * rows).sum() * temperature**2


def forget_of(batch: Batch) -> list[Sequence]:
    return [*batch.unsafe, *(p.unsafe for p in batch.pairs)]


def circuit_breaker(model: Any, batch: Batch, config: CircuitBreakerConfig, step: int, steps: int) -> dict[str, Tensor]:
    """Weighted terms at step t = ``step`` + 1 of ``steps``."""
    forget, retain = Passes(model, forget_of(batch)), Passes(model, list(batch.retain))
    progress = (step + 1) / (2 * steps)
    cosine = torch.cosine_similarity(forget.h[config.layers], forget.r[config.layers], dim=-1).relu()
    rows = forget.answers() if config.loss_mode != "prompt_response" else forget.real
    reroute = (cosine * rows).sum() / (rows.sum() * len(config.layers))
    distance = torch.linalg.vector_norm(retain.h - retain.r, dim=-1) * retain.real
    if config.published_quirks:
        kept = distance.sum() / (distance.shape[0] * distance.shape[1] * max(config.padded_length or 0, retain.width))
    else:
        kept = distance.sum() / (retain.real.sum() * distance.shape[0])
    return {"reroute": config.coefficient * (1 - progress) * reroute, "retain": config.coefficient * progress * kept}


def x_boundary(model: Any, batch: Batch, config: XBoundaryConfig, step: int, steps: int) -> dict[str, Tensor]:
    """Weighted terms at step t = ``step`` + 1 of ``steps``, pair by pair and row by row."""
    erased = Passes(model, list(batch.unsafe))
    apart, kept = (Passes(model, [getattr(p, half) for p in batch.pairs]) for half in ("unsafe", "safe"))
    retain = Passes(model, [*batch.retain, *(p.safe for p in batch.pairs)])
    share = (step + 1) / steps
    rows = erased.answers() if config.loss_mode != "prompt_response" else erased.real
    prompts = apart.real & ~apart.answers()
    apart_rows = {"prompt_all": prompts, "response_all": apart.answers(), "prompt_response": apart.real}
    boundary_rows = apart_rows[config.boundary_mode]
    erase, boundary = erased.h.new_zeros(()), erased.h.new_zeros(())
    for layer in config.layers:
        cosine = torch.cosine_similarity(erased.h[layer], erased.r[layer], dim=-1).relu()
        erase = erase + (cosine * rows).sum()
        for i in range(len(batch.pairs)):
            mean = F.normalize(kept.r[layer, i][kept.real[i]], dim=-1).mean(0)
            for h in apart.h[layer, i][boundary_rows[i]]:
                boundary = boundary + (h / h.norm() @ mean).relu()
    counted = int(rows.sum() + boundary_rows.sum()) * len(config.layers)
    distance = torch.linalg.vector_norm(retain.h - retain.r, dim=-1) * retain.real
    width = max(config.padded_length or 0, retain.width)
    padded = len(retain.sequences) * width if config.published_quirks else retain.real.sum()
    bent = config.coefficient * (1 - share) / counted
    return {
        "erase": bent * erase,
        "boundary": bent * boundary,
        "retain": config.coefficient * share * distance.sum() / (padded * distance.shape[0]),
    }


def rmu(model: Any, batch: Batch, config: RMUConfig) -> dict[str, Tensor]:
    """Weighted terms."""
    forget, retain = Passes(model, forget_of(batch)), Passes(model, list(batch.retain))
    drawn = torch.rand(forget.h.shape[-1], generator=torch.Generator().manual_seed(config.direction_seed)).double()
    control = (config.coefficient * drawn / drawn.norm()).to(forget.h)

    def mse(passes: Passes, rows: Tensor, target: Tensor) -> Tensor:
        squares = (passes.h[config.layer] - target).square().mean(-1) * rows
        padded = passes.real.numel() if config.padded_length is None else len(passes.sequences) * config.padded_length
        return squares.sum() / (padded if config.published_quirks else rows.sum())

    forget_rows = forget.answers() if config.loss_mode != "prompt_response" else forget.real
    return {
        "forget": mse(forget, forget_rows, control),
        "retain": config.retain * mse(retain, retain.real, retain.r[config.layer]),
    }


def npo(model: Any, batch: Batch, config: NPOConfig) -> dict[str, Tensor]:
    """Weighted terms."""
    forget = Passes(model, forget_of(batch))
    gap = forget.nll(forget.z)[0] - forget.nll(forget.z_ref)[0]
    forgotten = -2 / config.beta * F.logsigmoid(config.beta * gap).mean()
    return {"forget": forgotten} | _retained(model, batch, config, shifted=not config.published_quirks)


def _retained(model: Any, batch: Batch, config: ForgettingConfig, shifted: bool = True) -> dict[str, Tensor]:
    """The retain terms; ``shifted``: K compares the rows before the answer's tokens."""
    terms: dict[str, Tensor] = {}
    if config.retain_nll or config.retain_kl:
        retain = Passes(model, list(batch.retain))
        nll, tokens = retain.nll(retain.z)
        if config.retain_nll:
            terms["nll"] = config.retain_nll * nll.sum() / tokens.sum()
        if config.retain_kl:
            rows = retain.answers()
            if shifted:
                # The first token of a conversation has none before it.
                rows = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
            terms["kl"] = config.retain_kl * retain.kl(rows, config.temperature) / rows.sum()
    return terms


def simnpo(model: Any, batch: Batch, config: SimNPOConfig) -> dict[str, Tensor]:
    """Weighted terms."""
    forget = Passes(model, forget_of(batch))
    nll, tokens = forget.nll(forget.z)
    preference = -2 / config.beta * F.logsigmoid(config.beta * (nll / tokens - config.delta)).mean()
    return {"forget": config.forget * preference} | _retained(model, batch, config)


def weighted_ascent(model: Any, batch: Batch, config: AscentConfig) -> dict[str, Tensor]:
    """Weighted terms, the weights of the tokens taken token by token."""
    forget = Passes(model, forget_of(batch))
    found = []
    for i, s in enumerate(forget.sequences):
        for t in forget.answered(s):
            likely = forget.z[i, t - 1].softmax(-1)[forget.ids[i, t]]
            found.append(likely.detach() ** config.power * (1 - likely.detach()) ** config.rest_power * likely.log())
    return {"forget": config.forget * torch.stack(found).mean()} | _retained(model, batch, config)


def lowered_label(model: Any, batch: Batch, config: UNDIALConfig | CEUConfig) -> dict[str, Tensor]:
    """Weighted terms, word by word of the vocabulary."""
    forget = Passes(model, forget_of(batch))
    found = []
    for i, s in enumerate(forget.sequences):
        skipped = config.skipped_tokens if isinstance(config, CEUConfig) else 0
        turns = [t for t in forget.answered(s) if not {*range(t - skipped, t)} - {*forget.answered(s)}]
        for t in turns:
            label, log_p = forget.ids[i, t], forget.z[i, t - 1].log_softmax(-1)
            if isinstance(config, UNDIALConfig):
                known = forget.z_ref[i, t - 1].clone()
                known[label] -= config.strength
                found.append(-(known.softmax(-1) * log_p).sum())
            else:
                others = torch.arange(len(log_p)) != label
                rest = log_p.detach().exp()[others] / log_p.detach().exp()[others].sum()
                found.append(-(rest * log_p[others]).sum())
    return {"forget": config.forget * torch.stack(found).mean()} | _retained(model, batch, config)


def crl(model: Any, batch: Batch, config: CRLConfig, mean_gradient: bool = True) -> dict[str, Tensor]:
    """Weighted terms; the mean unsafe state is in the graph unless ``mean_gradient`` is False."""
    safe = Passes(model, [*batch.safe, *(p.safe for p in batch.pairs)])
    unsafe = Passes(model, forget_of(batch))
    safe_rows, unsafe_rows = (p.answers() if config.loss_mode != "prompt_response" else p.real for p in (safe, unsafe))
    mean = (unsafe.h * unsafe_rows[None, :, :, None]).sum((1, 2)) / unsafe_rows.sum()
    mean = mean if mean_gradient else mean.detach()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(x, y, dim=-1)

    terms = {}
    if config.safe:
        layers = list(range(safe.h.shape[0])) if config.alpha_mode == "all" else list(config.window)
        h, m = safe.h[layers], mean[layers][:, None, None]
        r = safe.r[layers]
        away = distance(h, r) if config.distance == "cosine" else torch.linalg.vector_norm(h - r, dim=-1)
        triplets = (away - distance(h, m) + config.safe_margin).relu()
        terms["safe"] = config.safe * (triplets * safe_rows).sum() / (safe_rows.sum() * len(layers))
    if config.unsafe:
        layers = list(config.window)
        h, m = unsafe.h[layers], mean[layers][:, None, None]
        triplets = (distance(h, m) - distance(h, unsafe.r[layers]) + config.unsafe_margin).relu()
        terms["unsafe"] = config.unsafe * (triplets * unsafe_rows).sum() / (unsafe_rows.sum() * len(layers))
    if config.kl:
        retain = Passes(model, list(batch.retain))
        count = len(batch.retain) if config.kl_reduction == "sequence" else retain.real.sum()
        terms["kl"] = config.kl * retain.kl(retain.real, config.temperature) / count
    return terms


def refusal(model: Any, pairs: tuple[PairSequence, ...], starts: list[int]) -> Tensor:
    """Mean NLL of the safe answers' tokens, one by one, each behind the prompt and the first tokens of the unsafe
    answer.
    """
    losses = []
    for pair, start in zip(pairs, starts, strict=True):
        prompt = pair.safe.ids[: pair.safe.prompt_length]
        answer = pair.safe.ids[pair.safe.prompt_length :]
        before = [*prompt, *pair.unsafe.ids[len(prompt) : len(prompt) + start]]
        log_probs = model(input_ids=torch.tensor([[*before, *answer]]), use_cache=False).logits[0].log_softmax(-1)
        losses += [-log_probs[len(before) - 1 + i, token] for i, token in enumerate(answer)]
    return torch.stack(losses).mean()
