"""The judges by name."""

from __future__ import annotations

from repbend_fast.evaluation.options import Catalog

PLACES = {
    "rule": "repbend_fast.evaluation.judges.rule:RuleJudge",
    "classifier": "repbend_fast.evaluation.judges.classifier:ClassifierJudge",
    "endpoint": "repbend_fast.evaluation.judges.endpoint:EndpointJudge",
}
JUDGES = Catalog("judge", PLACES)
