"""GCG finds suffixes that can be typed, halves its loss, draws the same under one seed, and keeps its budget."""

from __future__ import annotations

import chat_tokenizers
import pytest
import torch
from attacked_models import PROMPTS, attacked_model, peak_beyond, plain_loss, target_of

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.gcg import GCG, Typed, allowed_tokens, replacements
from repbend_fast.evaluation.attacks.requests import prompt_seed, suffixed, with_suffix
from repbend_fast.evaluation.attacks.scores import AnswerScore, differentiating

FEW = GCG(steps=6, candidates=24, top_k=32, rows=6)


def test_loss_falls_below_half_with_a_suffix_that_can_be_typed() -> None:
    model = attacked_model()
    target, prompt = target_of(model), PROMPTS[0]
    (result,) = GCG(steps=25, candidates=48, top_k=64, rows=12).run(target, [prompt])
    details = result.details
    assert details["last_loss"] < details["first_loss"] / 2
    # What is reported is the loss of the text, as anybody would measure it.
    ids = target.encoder.prompt_ids(with_suffix(prompt, details["suffix"]).conversation())
    answer = target.encoder.prompt_ids(with_suffix(prompt, details["suffix"]).conversation(), prompt.target)[len(ids) :]
    rows = model.get_input_embeddings()(torch.tensor(ids))
    assert float(plain_loss(model, rows, answer)) == pytest.approx(details["last_loss"], rel=1e-4)
    assert details["suffix"].isascii()


def test_one_seed_gives_one_suffix_whatever_came_before() -> None:
    target = target_of(attacked_model())
    both = list(FEW.run(target, PROMPTS, seed=3))
    (second,) = FEW.run(target, PROMPTS[1:], seed=3)
    assert (second.answers, second.details) == (both[1].answers, both[1].details)
    (other,) = FEW.run(target, PROMPTS[1:], seed=4)
    assert other.details["suffix"] != second.details["suffix"]
    assert prompt_seed(0, PROMPTS[0]) != prompt_seed(0, PROMPTS[1])


def test_tokens_are_ranked_by_the_gradient_of_one_hot_rows() -> None:
    model = attacked_model(dtype=torch.float64)
    target = target_of(model)
    request = suffixed(target.encoder, PROMPTS[0], " x" * 4, "Sure, here")
    weight = model.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(torch.tensor(request.ids), len(weight)).double().requires_grad_()
    (slopes,) = torch.autograd.grad(plain_loss(model, one_hot @ weight, list(request.answer)), one_hot)
    allowed = allowed_tokens(target, ascii_only=True)
    want = allowed[slopes[request.start : request.stop][:, allowed].argsort(dim=1)[:, :20]]
    with differentiating(model):
        score = AnswerScore(target, request, "test")
        _, gradient = score.gradient(score.start())
    assert torch.equal(replacements(target, gradient, allowed, 20), want)
    for wrong in (-gradient, gradient.roll(1, 0), torch.zeros_like(gradient)):
        assert not torch.equal(replacements(target, wrong, allowed, 20), want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_candidates_are_scored_as_each_alone_in_a_plain_forward(family: str) -> None:
    """Through copies of the shared prefix's cache, also where it lies behind a sliding window."""
    model = attacked_model(family, torch.float64)
    target = target_of(model)
    request = suffixed(target.encoder, PROMPTS[0], " x" * 4, "Sure, here")
    torch.manual_seed(0)
    candidates = torch.randint(10, 300, (5, request.stop - request.start))
    with differentiating(model), torch.no_grad():
        score = AnswerScore(target, request, "test")
        got = [score(score.embed(candidates)) for _ in range(2)]
    embed = model.get_input_embeddings()
    for row, candidate in enumerate(candidates.tolist()):
        ids = [*request.ids[: request.start], *candidate, *request.ids[request.stop :]]
        want = -plain_loss(model, embed(torch.tensor(ids)), list(request.answer))
        assert float(got[0][row]) == pytest.approx(float(want), rel=1e-9)
    assert torch.equal(got[0], got[1])
    assert len(set(got[0].tolist())) == 5


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "metaspace_legacy"])
def test_candidates_that_their_text_does_not_give_again_are_dropped(kind: str) -> None:
    """With tokenizers that write the blank into a word, beside it, and across words."""
    tokenizer = chat_tokenizers.make(kind)
    target, prompt = target_of(attacked_model(), tokenizer), PROMPTS[0]
    typed = Typed.behind(target.encoder, prompt, suffixed(target.encoder, prompt, " x" * 4, "Sure"))
    ids, start, stop = typed.request.ids, typed.request.start, typed.request.stop
    own = list(ids[start:stop])
    assert target.encoder.prompt_ids(with_suffix(prompt, typed.text(own)).conversation()) == list(ids)
    assert prompt.text + typed.text(own) == prompt.text + " x" * 4
    # The tokenizer has a token for both letters together.
    merged = [*own[:-2], *tokenizer.convert_tokens_to_ids(["q", "u"])]
    assert tokenizer("qu", add_special_tokens=False)["input_ids"] != tokenizer.convert_tokens_to_ids(["q", "u"])
    assert typed.surviving(torch.tensor([own, merged, own])).tolist() == [own, own]


def test_special_and_foreign_tokens_are_never_tried() -> None:
    target = target_of(attacked_model())
    tokenizer = target.encoder.tokenizer
    allowed = allowed_tokens(target, ascii_only=True).tolist()
    assert not {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} & set(allowed)
    assert all(tokenizer.decode([token]).isascii() for token in allowed)
    assert set(allowed) < set(allowed_tokens(target, ascii_only=False).tolist())


def test_the_suffix_stands_in_the_last_user_turn() -> None:
    turns = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", PROMPTS[0].text))
    prompt = Prompt("attack", PROMPTS[0].text, messages=turns, target="Sure")
    target = target_of(attacked_model())
    request = suffixed(target.encoder, prompt, " x x", "Sure")
    text = target.encoder.tokenizer.decode(request.ids[: request.start])
    assert text.endswith(PROMPTS[0].text)
    assert "Hi" in text


def test_chunks_follow_the_budget_and_change_nothing() -> None:
    """Peak bytes of all tensors that a search makes stay within the budget; without one they do not."""
    model, attack, peaks, found = attacked_model(), GCG(steps=2, candidates=40, top_k=32, rows=6), [], []
    budget = 5 << 19
    for limit in (None, budget):
        target = target_of(model, budget=limit)
        peaks.append(peak_beyond(model, lambda t=target: found.extend(attack.run(t, PROMPTS[:1]))))
    assert found[0].answers == found[1].answers
    assert found[0].details["suffix"] == found[1].details["suffix"]
    assert peaks[1] <= budget < peaks[0]


def test_candidates_are_halved_when_memory_runs_out(monkeypatch) -> None:
    model = attacked_model()
    (want,) = FEW.run(target_of(model), PROMPTS[:1])
    sizes: list[int] = []
    real = type(model).forward

    def with_room_for_ten(self, *args, **inputs):
        embedded = inputs.get("inputs_embeds")
        if embedded is not None and len(embedded) > 10:
            sizes.append(len(embedded))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", with_room_for_ten)
    (got,) = FEW.run(target_of(model), PROMPTS[:1])
    assert got.details["suffix"] == want.details["suffix"]
    assert len(sizes) == 2, "a size that failed is not tried again"


@pytest.mark.parametrize("budget", [1000])
def test_a_budget_for_nothing_is_said(budget: int) -> None:
    with pytest.raises(UserError, match=r"gcg for one prompt needs about .* budget is 0\.0 MiB"):
        next(iter(FEW.run(target_of(attacked_model(), budget=budget), PROMPTS)))


def test_profiles_and_settings() -> None:
    assert (GCG().steps, GCG().candidates, GCG().top_k, GCG().rows, GCG().replace) == (250, 512, 256, 20, 1)
    small = GCG(profile="small", top_k=8)
    assert (small.steps, small.candidates, small.top_k) == (64, 64, 8)
    with pytest.raises(UserError, match="gcg:profile=big; known: published, small"):
        GCG(profile="big")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gcg:steps=-1"):
        GCG(steps=-1)
