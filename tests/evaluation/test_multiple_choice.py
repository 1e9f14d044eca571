"""The call of ``lm-eval``, with modules in its place that take down what they are given."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from tiny_models import adapted_model

from repbend_fast.errors import UserError
from repbend_fast.evaluation.multiple_choice import multiple_choice

RESULTS = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 8, "bad": float("nan")},
        "own": {"alias": "own", "exact_match,none": 1},
    }
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def take(name: str, result: Any) -> Any:
        def call(**arguments: Any) -> Any:
            calls.append((name, arguments))
            return result

        return call

    for name, members in {
        "lm_eval": {"simple_evaluate": take("evaluate", RESULTS)},
        "lm_eval.tasks": {"TaskManager": take("manager", "the manager")},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": take("model", "the model")},
    }.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_model_is_handed_over_with_its_adapter_and_local_tasks_by_folder(calls, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text("task: own\n")
    model = adapted_model()
    model.train()
    got = multiple_choice(model, "tokenizer", ["arc", str(task)], batch_size=3, limit=5, few_shot=2)
    assert got == {"arc": {"acc,none": 0.25, "sample_len": 8.0}, "own": {"exact_match,none": 1.0}}
    given = dict(calls)
    assert given["model"]["pretrained"] is model.get_base_model()
    assert (given["model"]["tokenizer"], given["model"]["batch_size"]) == ("tokenizer", 3)
    assert given["manager"] == {"include_path": [str(tmp_path)]}
    evaluated = given["evaluate"]
    assert evaluated["tasks"] == ["arc", str(task)]
    assert (evaluated["model"], evaluated["task_manager"]) == ("the model", "the manager")
    assert (evaluated["limit"], evaluated["num_fewshot"], evaluated["log_samples"]) == (5, 2, False)
    assert model.training


def test_a_missing_extra_file_or_task_is_one_line(calls, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"no-such\.yaml: no such file"):
        multiple_choice(adapted_model(), None, ["no-such.yaml"])

    def fail(**_: Any) -> None:
        raise KeyError("arcc")

    sys.modules["lm_eval"].simple_evaluate = fail  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="could not run arcc"):
        multiple_choice(adapted_model(), None, ["arcc"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'repbend-fast\[lm-eval\]'"):
        multiple_choice(adapted_model(), None, ["arc"])
