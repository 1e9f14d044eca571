"""Every row of docs/models.md: the popular types' are decided anew here, the others' with ``-m models``."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import transformers
from model_page import PAGE, POPULAR, RECORD, page
from model_zoo import MODEL_TYPES, verdict

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
ROWS = {row["model_type"]: row for row in RECORDED["rows"]}
SAME_VERSION = RECORDED["versions"]["transformers"] == transformers.__version__


def _check(model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    assert json.loads(json.dumps(asdict(verdict(model_type)))) == ROWS[model_type]


@pytest.mark.parametrize("model_type", POPULAR)
def test_the_row_of_a_popular_type(model_type: str) -> None:
    _check(model_type)


@pytest.mark.models
@pytest.mark.parametrize("model_type", sorted(ROWS.keys() - set(POPULAR)))
def test_the_row_of_another_type(model_type: str) -> None:
    _check(model_type)


def test_the_page_is_what_the_record_says() -> None:
    assert page(RECORDED) == PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(not SAME_VERSION, reason="the record is of another version of transformers")
def test_every_registered_type_has_its_row() -> None:
    assert set(ROWS) == set(MODEL_TYPES)
    assert set(POPULAR) <= set(ROWS)
