"""The attacks by name."""

from __future__ import annotations

from repbend_fast.evaluation.options import Catalog

PLACES = {
    "direct": "repbend_fast.evaluation.attacks.direct:DirectAttack",
    "prefill": "repbend_fast.evaluation.attacks.prefill:PrefillAttack",
    "template": "repbend_fast.evaluation.attacks.template:TemplateAttack",
    "embedding-weak": "repbend_fast.evaluation.attacks.embedding:EmbeddingWeak",
    "embedding-strong": "repbend_fast.evaluation.attacks.embedding:EmbeddingStrong",
    "gcg": "repbend_fast.evaluation.attacks.gcg:GCG",
    "latent": "repbend_fast.evaluation.attacks.latent:Latent",
    "refusal-ablation": "repbend_fast.evaluation.attacks.refusal_ablation:RefusalAblation",
}
ATTACKS = Catalog("attack", PLACES)
