"""NPO, negative preference optimisation (Zhang et al., COLM 2024, arXiv 2404.05868).

    L = −(2/β)·mean_i log σ(β (NLL_i − NLL_ref,i)) + retain_nll·NLL/tokens + retain_kl·K

NLL_i sums over the answer tokens of forget sequence i. The retain terms, both off by default: the NLL per answer token, and
K = T²·KL(softmax(z_ref/T) ‖ softmax(z/T)) per answer token.
"""

from __future__ import annotations

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.base import (
    AnswerLoss,
    HeadKL,
    Stream,
    answer_rows,
    count,
    forget_sequences,
    l2_probe,
    predicting_rows,
)
from repbend_fast.objectives.sections import NPOConfig


class NPO:
    """Stream ``forget``, and ``retain`` where one of its terms has a weight."""

    uses_head = True

    def __init__(self, config: NPOConfig, num_blocks: int, steps: int | None = None) -> None:
        del steps  # the weights are constant
        self.config = config
        self.last_state = num_blocks
        self.roles = self.required_roles(config)

    @staticmethod
    def required_roles(config: NPOConfig) -> tuple[Role, ...]:
        """The roles whose records the terms with a weight read."""
        return ("unsafe", "pair", "retain") if config.retain_nll or config.retain_kl else ("unsafe", "pair")

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        del step
        sequences = forget_sequences(batch)
        loss = AnswerLoss("forget", predicting_rows(sequences), 1.0, max(1, len(sequences)), self.config.beta)
        streams = [Stream("forget", sequences, answers=loss)]
        if "retain" in self.roles:
            streams.append(self._retain(batch))
        return streams

    def probes(self, batch: Batch) -> list[Stream]:
        layers = (self.last_state,)
        return [*l2_probe("forget", forget_sequences(batch), layers), *l2_probe("retain", batch.retain, layers)]

    def _retain(self, batch: Batch) -> Stream:
        config, predicting = self.config, predicting_rows(batch.retain)
        # A slip of the published code: its KL reads the logits at the answer's tokens, one position after those that predict them.
        compared = answer_rows(batch.retain) if config.published_quirks else predicting
        kl = HeadKL("kl", compared, config.retain_kl, count(compared), config.temperature) if config.retain_kl else None
        nll = AnswerLoss("nll", predicting, config.retain_nll, count(predicting)) if config.retain_nll else None
        return Stream("retain", batch.retain, head=kl, answers=nll)
