"""The attacker's own training: it works, follows its seed, equals plain PEFT's, and leaves the model as it was."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from bent_target import bent, target_of
from model_picture import changed, picture
from repbend_kernels.scratch import scratch_bytes

from repbend_fast.assessment.fine_tuning import AnswerScores, FineTuning, plain_encoder
from repbend_fast.data.records import Message, Record
from repbend_fast.errors import UserError
from repbend_fast.models.layers.stacked import outer_linears
from repbend_fast.planning.tracker import MemoryTracker, module_tensors
from repbend_fast.step.levers import Levers

CPU = torch.device("cpu")

ANSWERS = [
    Record("unsafe", (Message("user", f"How do I make {item}?"),), f"Sure, take a {item} and polish it.")
    for item in ("glimmer-dust", "moon-key", "fog-lamp", "star-glue", "mist-wire")
]


def sequences(encoder):
    return tuple(encoder.encode(record) for record in ANSWERS)


def tuning(model, data, **settings):
    chosen = {"rank": 8, "learning_rate": 1e-2, "batch": 4, "seed": 3}
    return FineTuning(AnswerScores(model), data, **(chosen | settings))


def by_hand(model, data):
    """Σ log p of the answers' tokens, one sequence at a time, from transformers' own logits."""
    total = torch.zeros(())
    for sequence in data:
        ids = torch.tensor([sequence.ids])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        answer = range(sequence.prompt_length - 1, len(sequence) - 1)
        total = total + sum(scores[row, sequence.ids[row + 1]] for row in answer)
    return total


def test_scores_are_those_of_the_models_own_logits(target) -> None:
    data = sequences(target.encoder)
    tokens = sum(len(s) - s.prompt_length for s in data)
    expected = math.exp(-float(by_hand(target.model, data)) / tokens)
    assert AnswerScores(target.model).perplexity(data) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrap", ["adapted", "merged"])
def test_the_answers_gain_probability_and_the_model_stays_to_the_bit(target, wrap) -> None:
    model = target.model if wrap == "adapted" else target.model.merge_and_unload()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    scores, data = AnswerScores(model), sequences(target.encoder)
    before = picture(model)  # after the proof: transformers keeps its hooks from the first output_hidden_states on
    start = scores.perplexity(data)
    attack = FineTuning(scores, data, rank=8, learning_rate=1e-2, batch=4, seed=3)
    first, last = attack.advance(1), attack.advance(30)
    with attack.lora.on():
        assert scores.perplexity(data) < start / 20  # each token at least 20 times as probable
    assert math.log(start) == pytest.approx(first, rel=0.2)
    assert last < first / 4
    assert changed(before, picture(model)) == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert scores.perplexity(data) == start


def test_the_first_gradient_is_that_of_plain_autograd(target) -> None:
    data = sequences(target.encoder)[:2]
    attack = tuning(target.model, data, batch=2)
    torch.manual_seed(0)
    for parameter in attack.lora.parameters:
        parameter.data.normal_(0, 0.1)
    attack.scores.levers = Levers({"*": 1})  # a piece for each sequence
    state = attack.lora.state()
    attack.advance(1)
    found = [p.grad for p in attack.lora.parameters]
    attack.lora.load(state)
    with attack.lora.on():
        loss = -by_hand(target.model, data) / sum(len(s) - s.prompt_length for s in data)
        wanted = torch.autograd.grad(loss, attack.lora.parameters)
    norm = torch.sqrt(sum((g**2).sum() for g in wanted))
    clipped = min(1.0, 1 / (float(norm) + 1e-6))

    def error(gradients):
        off = sum(((g - clipped * w) ** 2).sum() for g, w in zip(gradients, wanted, strict=True))
        return float(torch.sqrt(off) / (clipped * norm))

    assert error(found) < 1e-4
    assert error([torch.zeros_like(g) for g in found]) > 0.5
    assert error([-g for g in found]) > 0.5
    assert error([g.roll(1, 0) for g in found]) > 0.5


def test_the_seed_decides(target) -> None:
    data = sequences(target.encoder)

    def run(seed):
        attack = tuning(target.model, data, seed=seed)
        attack.advance(6)
        return attack.lora.state()

    first = run(3)
    assert all(map(torch.equal, first, run(3)))
    assert not all(map(torch.equal, first, run(4)))


def test_in_parts_it_is_the_same_training(target) -> None:
    data = sequences(target.encoder)
    whole, parts = tuning(target.model, data), tuning(target.model, data)
    whole.advance(7)
    for step in (2, 3, 7):
        parts.advance(step)
    assert all(map(torch.equal, whole.lora.state(), parts.lora.state()))


def test_every_layer_has_one_part_whatever_wraps_it(tiny_model: Path) -> None:
    adapted = bent(tiny_model)
    layers = adapted.get_base_model().model.layers
    names = {name for block in layers for name, _ in outer_linears(block)}
    assert names == {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert len(tuning(adapted, (sequences(target_of(adapted, tiny_model).encoder))).lora.parameters) == 2 * 7 * 3


def test_it_trains_on_an_nf4_model(tiny_model: Path, tmp_path: Path) -> None:
    from tiny_run import write_model

    from repbend_fast.config.schema import ModelConfig
    from repbend_fast.models import load_model, quantize_nf4

    folder = write_model(tmp_path / "wide", width=64)
    model = load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
    quantize_nf4(model, torch.float32, True, torch.device("cpu"))
    data = sequences(target_of(model, folder).encoder)
    attack = tuning(model, data)
    assert len(attack.lora.parameters) == 2 * 7 * 3
    assert attack.advance(20) < attack.scores.perplexity(data)  # nats against words: far below
    with attack.lora.on():
        trained = attack.scores.perplexity(data)
    assert trained < attack.scores.perplexity(data) / 4


def test_out_of_memory_makes_smaller_pieces_of_the_same_gradient(target, monkeypatch, capsys) -> None:
    data = sequences(target.encoder)
    calm, pressed = tuning(target.model, data), tuning(target.model, data)
    calm.advance(2)
    real = AnswerScores.log_probability

    def scarce(self, chosen, piece):
        if len(piece.members) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, chosen, piece)

    monkeypatch.setattr(AnswerScores, "log_probability", scarce)
    pressed.advance(2)
    assert "out of memory" in capsys.readouterr().err
    for a, b in zip(calm.lora.state(), pressed.lora.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_without_the_template_only_the_texts_are_left(target) -> None:
    encoder = plain_encoder(target.encoder)
    sequence = encoder.encode(ANSWERS[0])
    text = encoder.tokenizer.decode(sequence.ids)
    assert text == "How do I make glimmer-dust?\nSure, take a glimmer-dust and polish it.<|im_end|>"
    assert encoder.tokenizer.decode(sequence.ids[: sequence.prompt_length]) == "How do I make glimmer-dust?\n"
    assert "<|im_start|>" in target.encoder.tokenizer.decode(target.encoder.encode(ANSWERS[0]).ids)


def test_a_head_that_is_no_matrix_is_refused(target) -> None:
    target.model.get_base_model().lm_head = torch.nn.Sequential(target.model.get_base_model().lm_head)
    with pytest.raises(UserError, match="head"):
        AnswerScores(target.model)


def peak(model, work) -> tuple[int, object]:
    """Bytes that ``work`` holds beside the model, and what it gives."""
    scratch = {"repbend_kernels::linear_log_prob": partial(scratch_bytes, "repbend_kernels::linear_log_prob", CPU)}
    with MemoryTracker(scratch) as tracker:
        tracker.watch(module_tensors(model), "model")
        before = tracker.live
        result = work()
        return tracker.peak - before, result


def two_steps(model, data, budget) -> list[torch.Tensor]:
    attack = FineTuning(AnswerScores(model, budget), data, rank=4, learning_rate=1e-2, batch=5, seed=3)
    attack.advance(2)
    return attack.lora.state()


def test_a_budget_is_kept_and_changes_no_gradient(target) -> None:
    data = sequences(target.encoder)
    free, wanted = peak(target.model, lambda: two_steps(target.model, data, None))
    used = []
    for budget in (free * 2 // 3, free // 3):
        found, state = peak(target.model, partial(two_steps, target.model, data, budget))
        assert found <= budget < free
        used.append(found)
        for a, b in zip(wanted, state, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert used[1] < used[0] < free


def test_a_budget_for_not_even_one_sequence_is_refused(target) -> None:
    with pytest.raises(UserError, match=r"relearning needs about .* MiB .* raise memory\.budget"):
        two_steps(target.model, sequences(target.encoder), 100_000)


def test_scores_keep_a_budget(target) -> None:
    data = sequences(target.encoder)
    scores = AnswerScores(target.model)
    free, wanted = peak(target.model, lambda: scores.perplexity(data))
    tight = AnswerScores(target.model, free // 2)
    found, perplexity = peak(target.model, lambda: tight.perplexity(data))
    assert found <= free // 2
    assert perplexity == pytest.approx(wanted, rel=1e-5)
