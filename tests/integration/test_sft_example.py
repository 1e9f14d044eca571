"""TRL's trainer with bending, as the example writes it: on TRL itself where it is installed, and on a stand-in."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import sft_with_bending
from peft import PeftModel, get_peft_model
from tiny_run import TinyRun
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from repbend_fast.errors import UserError
from repbend_fast.integration import BendingMixin


@dataclass
class SFTConfig(TrainingArguments):
    max_length: int = 1024


class SFTTrainer(Trainer):
    """What the example asks of TRL's: conversations by the tokenizer's template, LoRA by ``peft_config``."""

    def __init__(
        self, model: Any, args: SFTConfig, train_dataset: Any, processing_class: Any, peft_config: Any
    ) -> None:
        def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
            text = processing_class.apply_chat_template(row["messages"], tokenize=False)
            return {"input_ids": processing_class(text)["input_ids"][: args.max_length]}

        super().__init__(
            model=get_peft_model(model, peft_config),
            args=args,
            train_dataset=train_dataset.map(tokens, remove_columns=["messages"]),
            data_collator=DataCollatorForLanguageModeling(processing_class, mlm=False),
            processing_class=processing_class,
        )


@pytest.fixture(params=["stand-in", "itself"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "itself":
        pytest.importorskip("trl", reason="TRL is not installed")
        return
    module: Any = types.ModuleType("trl")
    module.SFTConfig, module.SFTTrainer = SFTConfig, SFTTrainer
    monkeypatch.setitem(sys.modules, "trl", module)


def test_a_step_has_both_losses(library: None, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[PeftModel] = []
    begin = BendingMixin._begin

    def seen(self: Any, model: Any) -> Any:
        models.append(self.accelerator.unwrap_model(model))
        return begin(self, model)

    monkeypatch.setattr(BendingMixin, "_begin", seen)
    rows = sft_with_bending.main(str(tiny.recipe), ["lora.target_modules=[q_proj, up_proj]", "lora.r=2"], steps=3)
    assert len(rows) == 3
    assert rows[0]["bend_unsafe"] == rows[0]["bend_safe"] == 0.0
    assert rows[2]["bend_unsafe"] > 0
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    [model] = models
    assert {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "q_proj",
        "up_proj",
    }


def test_without_trl_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install trl"):
        sft_with_bending.main()
