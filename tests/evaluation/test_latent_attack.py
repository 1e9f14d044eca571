"""The latent attack lowers the published loss within its balls, and its answer is that of the perturbed model."""

from __future__ import annotations

import math

import pytest
import torch
from attacked_models import PROMPTS, attacked_model, peak_beyond, target_of

from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.latent import Latent, PerturbedRequest, states_at
from repbend_fast.evaluation.attacks.requests import answer_ids
from repbend_fast.evaluation.attacks.room import PassCost
from repbend_fast.evaluation.attacks.scores import differentiating
from repbend_fast.models import find_decoder
from repbend_fast.models.perturbation import visiting

REFUSAL = "I can not help with that."


def unchanged(_: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def a_request(model, **settings) -> tuple[PerturbedRequest, list[int], list[list[int]]]:
    target = target_of(model, **settings)
    ids, answer = answer_ids(target.encoder, PROMPTS[1], PROMPTS[1].target)
    refusal = answer_ids(target.encoder, PROMPTS[1], REFUSAL)[1]
    return PerturbedRequest(target, ids, (answer, refusal)), list(ids), [list(answer), list(refusal)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_the_published_one(family: str) -> None:
    """Half the complying answer's cross-entropy and half −log(1 − p) of the refusal, each over its own tokens."""
    model = attacked_model(family, torch.float64)
    request, ids, answers = a_request(model)
    probabilities = []
    for answer in answers:
        logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        probabilities.append(logits.softmax(-1)[range(len(answer)), answer])
    towards, away = probabilities
    want = -0.5 * towards.log().mean() - 0.5 * (1 - away).log().mean()
    with differentiating(model), torch.no_grad():
        assert float(request.loss(unchanged)) == pytest.approx(float(want), rel=1e-7)
        assert float(request.log_prob(unchanged)) == pytest.approx(float(towards.log().mean()), rel=1e-7)


def by_hand(model, perturbation, ids: list[int], count: int) -> list[int]:
    """Greedy tokens with δ at the prompt's rows of every pass, without a cache."""
    added = {state: delta.detach()[: len(ids)] for state, delta in perturbation.deltas.items()}

    def visit(state: int, hidden: torch.Tensor) -> torch.Tensor:
        if state not in added:
            return hidden
        return torch.cat((hidden[:, : len(ids)] + added[state].to(hidden), hidden[:, len(ids) :]), dim=1)

    answer: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            with visiting(model, visit):
                token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
            answer.append(token)
    return answer


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_answer_goes_on_from_the_perturbed_prompt(family: str) -> None:
    model = attacked_model(family)
    request, ids, _ = a_request(model)
    with differentiating(model):
        perturbation, _ = request.find({0: 0.5, 2: 2.0}, "l2", 6, 0.2)
    want = by_hand(model, perturbation, ids, 6)
    tokenizer = target_of(model).encoder.tokenizer
    assert request.answer(perturbation) == tokenizer.decode(want, skip_special_tokens=True).strip()
    plain = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=6
    )
    assert plain[0, len(ids) :].tolist() != want


@pytest.mark.parametrize(
    "attack",
    [Latent(refusal=REFUSAL), Latent(ball="linf", epsilon=0.1, rate=0.02, scale="reference", refusal="")],
    ids=["published", "linf"],
)
def test_the_answer_becomes_likelier(attack: Latent) -> None:
    """Its mean log-probability a token is less than a quarter of what it was; equal runs give equal numbers."""
    target = target_of(attacked_model())
    results = list(attack.run(target, PROMPTS))
    for result in results:
        before, after = result.details["log_prob"]
        assert after > before / 4
        assert result.details["last_loss"] < result.details["first_loss"] / 2
    (alone,) = attack.run(target, PROMPTS[1:], seed=9)
    assert (alone.answers, alone.details) == (results[1].answers, results[1].details)


def test_radii_follow_the_rows_of_each_state() -> None:
    model = attacked_model()
    target = target_of(model)
    (result,) = Latent(epsilon=0.5, scale="reference", steps=1, states="0 0.5").run(target, PROMPTS[:1])
    ids = target.encoder.prompt_ids(PROMPTS[0].conversation())
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    want = [0.5 * float(states[state][0].norm(dim=-1).median()) for state in (0, 2)]
    assert result.details["epsilon"] == pytest.approx(want, rel=1e-5)


def test_a_small_budget_recomputes_blocks_and_finds_the_same() -> None:
    """Both answers' graphs are planned for: a budget for one of them is none."""
    model, found, peaks = attacked_model(), [], []
    _, ids, answers = a_request(model)
    tokens, kept = len(ids) + len(answers[1]) - 1, len(answers[1])
    budget = 2 * PassCost.of(model).backward(tokens, kept, recompute=True)
    for limit in (None, budget):
        request, _, _ = a_request(model, budget=limit)
        with differentiating(model):
            peaks.append(peak_beyond(model, lambda r=request: found.append(r.find({0: 0.5, 2: 2.0}, "l2", 3, 0.2)[1])))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert peaks[1] <= budget
    assert peaks[1] < 0.7 * peaks[0]
    with pytest.raises(UserError, match="latent for one prompt needs about"):
        a_request(model, budget=budget - 1)


def test_blocks_are_recomputed_once_memory_runs_out(monkeypatch) -> None:
    model = attacked_model()
    request, _, _ = a_request(model)
    with differentiating(model):
        want = request.find({0: 0.5}, "l2", 2, 0.2)[1]
    request, _, _ = a_request(model)
    real, failures = PerturbedRequest.loss, []

    def without_room(self, visit):
        if not self._recompute:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, visit)

    monkeypatch.setattr(PerturbedRequest, "loss", without_room)
    with differentiating(model):
        assert request.find({0: 0.5}, "l2", 2, 0.2)[1] == pytest.approx(want, rel=1e-5)
    assert failures == [1]


def test_states_are_shares_of_the_depth() -> None:
    assert states_at(Latent().shares(), 32) == [0, 8, 16, 24, 30]
    assert states_at(Latent().shares(), 4) == [0, 1, 2, 3]
    assert states_at([0.01, 0.99], 4) == [1, 3]


@pytest.mark.parametrize("states", ["", "0 1.0", "half", "-0.5", "nan"])
def test_states_that_cannot_be_are_refused(states: str) -> None:
    with pytest.raises(UserError, match="latent:states="):
        Latent(states=states)


@pytest.mark.parametrize(
    "settings", [{"epsilon": 0.0}, {"rate": math.nan}, {"steps": 0}, {"ball": "l1"}, {"scale": "own"}]
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"latent:{name}="):
        Latent(**settings)


def test_the_perturbed_model_is_found_at_its_blocks() -> None:
    """One pass visits the states before the final norm, in order."""
    model, seen = attacked_model(), []

    def visit(state: int, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(state)
        return hidden

    with visiting(model, visit):
        model(torch.tensor([[1, 2, 3]]), use_cache=False)
    assert seen == list(range(find_decoder(model).num_blocks))
