"""All attacks by name, those that change the model included."""

from __future__ import annotations

from repbend_fast.evaluation.attacks import known
from repbend_fast.evaluation.options import Catalog

CHANGES = {
    "relearning": "repbend_fast.assessment.relearning:Relearning",
    "rounding": "repbend_fast.assessment.rounding:Rounding",
}
EVERY = (
    *("direct", "prefill", "template", "rounding", "refusal-ablation", "latent"),
    *("embedding-weak", "embedding-strong", "relearning", "gcg"),
)
"""What ``all`` stands for: every attack that needs no second model, the quick ones first."""
ATTACKS = Catalog("attack", known.PLACES | CHANGES)
