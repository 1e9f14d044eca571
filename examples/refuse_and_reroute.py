"""An objective of your own, for ``objective.name: refuse_and_reroute:RefuseAndReroute``.

    L = refuse·NLL(safe answers) + reroute·mean relu(cos(h, r)) on unsafe answers + keep·KL on ordinary chat

Put the module where Python finds it (the folder that you start from will do) and name it in the recipe:

    objective:
      name: refuse_and_reroute:RefuseAndReroute
      settings: {layers: [9, 19], reroute: 2.0}

The streams are all that an objective says: reference passes, memory levers, QLoRA, checkpoints and the guard come with
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.objectives import AnswerLoss, Distance, HeadKL, Probes, Stream
from repbend_fast.objectives.rows import all_rows, answer_rows, count, mean_distance, predicting_rows

DEFAULTS: dict[str, Any] = {"layers": [10, 20], "refuse": 1.0, "reroute": 1.0, "keep": 1.0}


class RefuseAndReroute:
    """Learns the safe answers of pairs, reroutes the unsafe ones, keeps everything else."""

    roles = ("pair", "retain")
    uses_head = True

    def __init__(self, settings: Mapping[str, Any], num_blocks: int, steps: int | None = None) -> None:
        unknown = settings.keys() - DEFAULTS.keys()
        if unknown:
            raise UserError(
                f"objective.settings: unknown key {', '.join(sorted(unknown))}; known are {', '.join(DEFAULTS)}"
            )
        self.settings = {**DEFAULTS, **settings}
        self.layers = tuple(self.settings["layers"])
        if not 0 < max(self.layers) <= num_blocks:
            raise UserError(
                f"objective.settings.layers={list(self.layers)}: this model has hidden states 0 … {num_blocks}"
            )
        self.last_state = num_blocks

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        settings = self.settings
        safe, unsafe = tuple(p.safe for p in batch.pairs), tuple(p.unsafe for p in batch.pairs)
        learned, rerouted, kept = predicting_rows(safe), answer_rows(unsafe), all_rows(batch.retain)
        return [
            Stream("safe", safe, (AnswerLoss("refuse", learned, settings["refuse"], count(learned)),)),
            Stream(
                "unsafe",
                unsafe,
                (
                    Distance(
                        "reroute",
                        self.layers,
                        rerouted,
                        settings["reroute"],
                        count(rerouted) * len(self.layers),
                        kind="relu_cosine",
                    ),
                ),
            ),
            Stream("retain", batch.retain, (HeadKL("kl", kept, settings["keep"], count(kept), temperature=2.0),)),
        ]

    def probes(self, batch: Batch) -> Probes:
        """What the guard measures: how far unsafe and safe answers have moved."""
        unsafe, safe = tuple(p.unsafe for p in batch.pairs), tuple(p.safe for p in batch.pairs)
        return Probes(mean_distance("unsafe", unsafe, self.layers), mean_distance("safe", safe, self.layers))
