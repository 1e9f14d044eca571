"""The attack that nobody means as one: the merged model rounded to few bits, as most people run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
from repbend_kernels import linear_kl_div
from torch import Tensor

from repbend_fast.assessment.effect_left import EffectSums
from repbend_fast.assessment.few_bits import USUAL, rounding_to
from repbend_fast.assessment.fine_tuning import AnswerScores
from repbend_fast.data.prompts import Prompt, limit_per_kind
from repbend_fast.data.records import Sequence as Ids
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Target
from repbend_fast.evaluation.measure import PREFILL
from repbend_fast.models import reference_model
from repbend_fast.models.decoder import Head, find_head, run_decoder
from repbend_fast.models.layers.rounded import rounded_weights
from repbend_fast.runs.folder import finite
from repbend_fast.step.pieces import Piece

ANSWER_ROWS = 16
LOGIT_ROWS = 32


@dataclass(slots=True)
class Rounding:
    """Merge the adapter into the weights, round the linear layers of the blocks, and ask the model again.

    Embedding and head keep their precision, as with NF4 in transformers; a GGUF file of that type rounds them too. What
    is measured, on the positions from the last token of an attack prompt on over the beginning of a complying answer,
    is how far the rounded model is from the bent one and from the *unquantised* base, and how much of what the adapter
    did is left (:func:`survival`).

    Args:
        formats: of ``nf4`` and GGUF's ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``q8_0``, ``q4_k``, ``q5_k``, ``q6_k``
            and ``q4_k_m``, the last four by an encoder of our own (``assessment/k_quants.py``).
        double_quantization: of NF4.
        measured: attack prompts that the distances are measured on, at even distances.
    """

    name: ClassVar[str] = "rounding"

    formats: tuple[str, ...] = USUAL
    double_quantization: bool = True
    measured: int = 32
    folder: Path | None = field(default=None, init=False)
    _summary: dict[str, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in self._formats():
            rounding_to(name, self.double_quantization)
        if self.measured < 1:
            raise UserError(f"rounding: measured={self.measured}; give a number from 1 on")

    def variants(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[tuple[str, Target]]:
        """The merged model in each format, ``rounding-nf4`` and so on. Nothing is random.

        Raises:
            UserError: no attack prompts, weights that are quantised already, an adapter that cannot be merged, a model
                whose head is no plain matrix, or no memory.
        """
        states = _States(target, [p for p in prompts if p.kind == "attack"], self.measured)
        base = bent = states.now()
        adapted = hasattr(target.model, "peft_config")
        if adapted:
            with reference_model(target.model):
                base = states.now()
        rows: list[dict[str, object]] = []
        self._summary = {"rows": rows, "kl_base_to_bent": states.divergence(base, bent) if adapted else None}
        for name in self._formats():
            rounded = partial(
                rounded_weights,
                target.model,
                states.decoder.layers,
                rounding_to(name, self.double_quantization),
                folder=self.folder,
            )
            noisy = bent
            if adapted:
                with rounded(adapter=False):
                    noisy = states.now()
            with rounded(adapter=True) as count:
                found = states.now()
                row: dict[str, object] = {"format": name, "rounded_share": count.rounded / max(1, count.weights)}
                row["kl_bent_to_rounded"] = states.divergence(bent, found)
                if adapted:
                    row["kl_base_to_rounded"] = states.divergence(base, found)
                    row |= survival(states.head, base, bent, found, noisy)
                rows.append(row)
                yield f"{self.name}-{name}", target

    def summary(self) -> dict[str, object]:
        """``rows``, one for each format, and ``kl_base_to_bent``, what the unrounded adapter does. Kullback-Leibler
        divergences are in nats per position. A model without an adapter apart has neither base nor survival.
        """
        return cast(dict[str, object], finite(self._summary))

    def _formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.lower() for name in self.formats))


def survival(head: Head, base: Tensor, bent: Tensor, rounded: Tensor, rounded_base: Tensor) -> dict[str, float | None]:
    """How much of the adapter's effect on the logits is left after rounding.

    With the logits b of the base, m of the bent model, r of the bent model rounded, and q of the base rounded, all
    positions one long vector and each position's mean taken off (a constant changes no probability):

        ``survives``    ⟨r − q, m − b⟩ / ‖m − b‖²    1 where rounding does nothing to the effect, 0 where it leaves
                                                     nothing of it: rounded, both models are the same
        ``towards``     ⟨r − b, m − b⟩ / ‖m − b‖²    seen from the unquantised base: ``survives`` + ``noise_towards``
        ``noise_towards``  ⟨q − b, m − b⟩ / ‖m − b‖²    what rounding alone happens to do in this direction
        ``noise``       ‖q − b‖ / ‖m − b‖             rounding's size beside the adapter's

    Args:
        head: of the model, which is not rounded.
        base, bent, rounded, rounded_base: final hidden states of the same positions, [N, D].

    Returns:
        The four shares; None each for an adapter without an effect.
    """
    sums = EffectSums()
    for start in range(0, len(base), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        sums.add(*(_logits(head, states[rows]) for states in (base, bent, rounded, rounded_base)))
    return sums.shares()


def _logits(head: Head, states: Tensor) -> Tensor:
    """Logits of each row, float32 or wider."""
    logits = torch.nn.functional.linear(head.inputs(states), head.weight, head.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


class _States:
    """Final hidden states at the measured positions, of a model as it is at the time."""

    def __init__(self, target: Target, prompts: Sequence[Prompt], limit: int) -> None:
        if not prompts:
            raise UserError("rounding: no attack prompts; name a suite that has some")
        self._scores = AnswerScores(target.model, target.budget)
        self.decoder = self._scores.parts.decoder
        self.head = find_head(target.model).on(self.decoder.device)
        self._sequences = tuple(_begun(target.encoder, prompt) for prompt in limit_per_kind(list(prompts), limit))
        self._spans = tuple((s.prompt_length - 1, len(s)) for s in self._sequences)

    @torch.no_grad()
    def now(self) -> Tensor:
        """[N, D], prompt by prompt."""
        found: dict[int, Tensor] = {}
        for piece, rows in self._scores.each_piece(self._sequences, self._final_rows):
            lengths = [self._spans[m][1] - self._spans[m][0] for m in piece.members]
            found |= zip(piece.members, rows.split(lengths), strict=True)
        return torch.cat([found[member] for member in range(len(self._sequences))])

    def _final_rows(self, piece: Piece) -> tuple[Piece, Tensor]:
        found: list[Tensor] = []
        last, rows = self.decoder.num_blocks, piece.rows(self._spans)

        def visit(layer: int, hidden: Tensor) -> Tensor:
            if layer == last:
                found.append(hidden.reshape(-1, hidden.shape[-1])[rows])
            return hidden

        run_decoder(self.decoder, piece.input_ids, stop=last, visit=visit)
        return piece, found[0]

    @torch.no_grad()
    def divergence(self, reference: Tensor, other: Tensor) -> float:
        """KL(reference ‖ other) in nats per position."""
        head = self.head
        total = linear_kl_div(
            head.inputs(other), head.inputs(reference), head.weight, bias=head.bias, softcap=head.softcap
        )
        return float(total) / len(reference)


def _begun(encoder: ChatEncoder, prompt: Prompt) -> Ids:
    """The prompt with the first tokens of the complying answer that its set names, or of the usual one."""
    asked = encoder.prompt_ids(prompt.conversation(), "", prompt.tools)
    ids = encoder.prompt_ids(prompt.conversation(), prompt.target or PREFILL, prompt.tools)
    return Ids(tuple(ids[: len(asked) + ANSWER_ROWS]), len(asked))
