"""Every attack that there is, on both sides of one run: rows, summary, page, and a model that is as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinyRun, records, write_records

from repbend_fast.assessment import asking, target
from repbend_fast.assessment.known_attacks import ATTACKS
from repbend_fast.cli import main

SMALLEST = (
    "template:names=role-play",
    "embedding-weak:steps=2,max_new_tokens=3",
    "embedding-strong:steps=2,generations=2,max_new_tokens=3",
    "gcg:steps=2,candidates=4,top_k=4",
    "latent:steps=2",
    "refusal-ablation:count=4,validation=2",
    "rounding:formats=nf4,measured=1",
)
"""Of every attack that has settings."""
FINE_TUNED = "relearning:data={0},ordinary={0},kinds=harmful,records=4,learning_rates=0.01,ranks=4,steps=2"
ONE_POINT = f"{FINE_TUNED},batch=2,held=4,asked=1,answer_tokens=3,bound=1e9"


class Watched:
    """The models of an evaluation, and what their weights were when they were loaded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self.models: dict[str, Any] = {}
        load, put = asking.load_base, target.put_adapter
        self._remember = {"base": lambda *given: load(*given), "bent": lambda *given: put(*given)}
        patch.setattr(asking, "load_base", lambda *given: self._kept("base", given))
        patch.setattr(target, "put_adapter", lambda *given: self._kept("bent", given))

    def _kept(self, side: str, given: tuple[Any, ...]) -> Any:
        found = self._remember[side](*given)
        model = found[0] if side == "base" else found
        self.models[side] = model
        self.weights[side] = {name: values.clone() for name, values in model.state_dict().items()}
        return found

    def check(self) -> None:
        """The bent model, which holds the base: same weights, no hooks, frozen, evaluating."""
        now = self.models["bent"].state_dict()
        assert now.keys() == self.weights["bent"].keys()
        assert all(torch.equal(now[name], values) for name, values in self.weights["bent"].items())
        plain = {name.replace(".base_layer", "").removeprefix("base_model.model."): v for name, v in now.items()}
        assert all(torch.equal(plain[name], values) for name, values in self.weights["base"].items())
        for module in self.models["bent"].modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            # transformers leaves hooks of its own where hidden states were asked for; they do nothing afterwards.
            assert all(hook.__module__.startswith("transformers.") for hook in hooks)
            assert not module.training
        assert not any(p.requires_grad or p.grad is not None for p in self.models["bent"].parameters())


def perplexity(model: Any, encoder: Any, rows: list[dict[str, Any]]) -> float:
    """Of the answers to a conversation's last request, one conversation at a time."""
    from repbend_fast.data.records import Message

    total, count = 0.0, 0
    for row in rows:
        request, answer = (Message(m["role"], m["content"]) for m in row["messages"])
        asked = encoder.prompt_ids((request,))
        ids = [*encoder.prompt_ids((request,), answer.content), encoder.tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(asked) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(asked) :]), reduction="sum"))
        count += len(ids) - len(asked)
    return math.exp(total / count)


@pytest.mark.slow
def test_every_attack_on_both_sides(
    whole: TinyRun, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    chat = [row for row in records(first=30, count=3) if row["role"] == "retain"]
    data = write_records(tmp_path / "attacker.jsonl", records(count=12))
    held = write_records(tmp_path / "chat.jsonl", chat)
    out = tmp_path / "eval"
    words = ["--attack", "all", *(w for text in (*SMALLEST, ONE_POINT.format(data)) for w in ("--attack", text))]
    words += ["--limit", "1", "--max-new-tokens", "3", "--chat", str(held), "--out", str(out)]
    assert main(["eval", str(whole.path), "--suite", str(prompts), *words]) == 0
    watched.check()

    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    names = set(ATTACKS.names()) - {"relearning", "rounding"} | {"relearning-harmful", "rounding-nf4"}
    for side in ("base", "bent"):
        asked = [row for row in rows if row["side"] == side and row["kind"] == "attack"]
        assert {row["attack"].partition(":")[0] for row in asked} == names
        assert len(asked) == len(names)
        assert all(row["answers"] and len(row["opinions"]["rule"]) == len(row["answers"]) for row in asked)

    summary = json.loads((out / "eval.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    groups = [(g["side"], g["attack"].partition(":")[0]) for g in summary["groups"] if g["kind"] == "attack"]
    assert sorted(groups) == sorted((side, name) for side in ("base", "bent") for name in names)
    assert summary["failed"] == []
    assert [(found["side"], found["steps"], len(found["curve"])) for found in summary["relearning"]] == [
        ("base", 2, 1),
        ("bent", 2, 1),
    ]
    assert [(found["side"], found["rows"][0]["format"]) for found in summary["rounding"]] == [
        ("base", "nf4"),
        ("bent", "nf4"),
    ]
    assert summary["rounding"][1]["kl_base_to_bent"] > 0

    check_usefulness(summary["usefulness"], watched.models["bent"], whole, chat)
    assert (
        main(["lens", str(whole.path), "--prompt", "What is rain?", "--tokens", "2", f"--out={out / 'lens.json'}"]) == 0
    )
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not [name for name in names if name not in page]
    assert "Logit lens: the top word at each layer and token" in page
    assert "perplexity ratio" in page


def check_usefulness(found: dict[str, Any], model: Any, run: TinyRun, chat: list[dict[str, Any]]) -> None:
    """Against transformers alone."""
    encoder = target.encoder_of(target.find_subject(str(run.path)))
    base, bent = found["base"], found["bent"]
    with torch.no_grad():
        assert bent["perplexity"] == pytest.approx(perplexity(model, encoder, chat), rel=1e-4)
        with model.disable_adapter():
            assert base["perplexity"] == pytest.approx(perplexity(model, encoder, chat), rel=1e-4)
    assert bent["perplexity_ratio"] == pytest.approx(bent["perplexity"] / base["perplexity"], rel=1e-6)
    assert base["perplexity_ratio"] is None
    assert bent["kl"] > 0
    assert bent["first_token_kl"] > 0
    for side in (base, bent):
        assert (side["conversation_count"], side["over_refusal_count"]) == (3, 1)
        assert 0 <= side["over_refusal"] <= 1
        assert 0 < side["mean_answer_tokens"] <= 3
        assert 0 <= side["stopped"] <= 1
