"""Embedding attacks take the steps that their descriptions say, raise the answer's probability, and read answers right
from embeddings.
"""

from __future__ import annotations

import contextlib
import json
import math

import chat_tokenizers
import pytest
import torch
from attacked_models import PROMPTS, attacked_model, peak_beyond, plain_loss, target_of

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation import generate
from repbend_fast.evaluation.attacks.embedding import Descent, EmbeddingStrong, EmbeddingWeak
from repbend_fast.evaluation.attacks.requests import suffixed
from repbend_fast.evaluation.attacks.room import PassCost
from repbend_fast.evaluation.attacks.scores import AnswerScore, answers_behind, differentiating
from repbend_fast.evaluation.generate import generate_answers


def by_description(model, encoder, prompt: Prompt, suffix: str, rate: float, steps: int, *, signed: bool):
    """The attack from its description: every step one plain forward over the whole request, no cache, no shortcuts."""
    tokenizer = encoder.tokenizer
    turn = [{"role": "user", "content": prompt.text + suffix}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = text.split(suffix)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, suffix, after, prompt.target)]
    parts[0] = [tokenizer.bos_token_id, *parts[0]]
    embed = model.get_input_embeddings()
    head, x, tail = (embed(torch.tensor(ids)).detach() for ids in parts[:3])
    losses = []
    for _ in range(steps):
        x = x.clone().requires_grad_()
        loss = plain_loss(model, torch.cat((head, x, tail)), parts[3])
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x - rate * (gradient.sign() if signed else gradient)).detach()
    return losses


@pytest.mark.parametrize(("family", "signed"), [("llama", True), ("gemma3", True), ("qwen2", False)])
def test_losses_are_those_of_the_description(family: str, signed: bool) -> None:
    """In float64 to rounding, through the shared prefix, sliding windows and scaled embeddings."""
    model = attacked_model(family, torch.float64)
    target, prompt, steps = target_of(model), PROMPTS[0], 12
    if signed:
        attack, suffix = (
            EmbeddingStrong(steps=steps, generations=1, start="The quick brown fox."),
            " The quick brown fox.",
        )
    else:
        attack, suffix = EmbeddingWeak(steps=steps, rate=0.5, rows=6), " x" * 6
    want = by_description(model, target.encoder, prompt, suffix, attack.rate, steps, signed=signed)
    request = suffixed(target.encoder, prompt, suffix, prompt.target)
    with differentiating(model):
        score = AnswerScore(target, request, "test")
        got = Descent(attack.rate, signed, steps, 0.0, 1).run(score.start(), score.gradient).losses
    assert got == pytest.approx(want, rel=1e-9)
    assert len(set(got)) == steps
    details = next(iter(attack.run(target, [prompt]))).details
    assert details["first_loss"] == pytest.approx(want[0], rel=1e-9)
    assert details["last_loss"] == pytest.approx(want[-1], rel=1e-9)
    # The comparison sees a step in the wrong direction, and one row too few.
    wrong = Descent(-attack.rate, signed, steps, 0.0, 1)
    with differentiating(model):
        assert wrong.run(score.start(), score.gradient).losses[-1] != pytest.approx(want[-1], rel=1e-3)
        start = score.start()
        assert float(score(start.roll(1, 0).unsqueeze(0))) != pytest.approx(-want[0], rel=1e-3)


@pytest.mark.parametrize(
    ("attack", "factor"),
    [(EmbeddingWeak(steps=25, rate=1.0), 2.0), (EmbeddingStrong(steps=40, rate=1e-2, generations=2), 4.0)],
    ids=["weak", "strong"],
)
def test_the_answer_becomes_likelier(attack, factor: float) -> None:
    """Its mean log-probability a token falls to a share of 1 / ``factor`` of what it was, for each prompt."""
    target = target_of(attacked_model())
    results = list(attack.run(target, PROMPTS))
    assert [r.index for r in results] == [0, 1]
    for result, prompt in zip(results, PROMPTS):
        assert result.details["last_loss"] < result.details["first_loss"] / factor
        assert len(result.answers) == getattr(attack, "generations", 1)
        if result.details["last_loss"] < -math.log(0.5) / len(prompt.target):
            assert all(answer.startswith(prompt.target) for answer in result.answers)


def slopes(losses: list[float]):
    """A gradient whose losses are given; the rows count the steps."""
    left = iter(losses)
    return lambda rows: (next(left), -torch.ones_like(rows))


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([9, 9, 0, 0, 0, 0, 0, 0, 0], [2, 5, 8]),  # below the threshold at 2: three answers, three steps apart
        ([9, 0, 9, 0, 9, 0, 9, 9, 9, 0], [1, 5, 9]),
        ([9] * 30, [9, 12, 15]),  # never: at the last step, and at steps beyond it
        ([9] * 8 + [0] * 30, [8, 9, 12]),  # the last step counts whatever lies before it
    ],
)
def test_when_answers_are_generated(losses: list[float], kept: list[int]) -> None:
    found = Descent(1.0, True, 10, 0.5, generations=3, gap=3).run(torch.zeros(1, 2), slopes(losses))
    assert found.steps == kept
    assert [float(rows[0, 0]) for rows in found.rows] == kept
    assert len(found.losses) == kept[-1] + 1


def test_a_weak_attack_ends_below_its_threshold() -> None:
    found = Descent(1.0, False, 500, 0.05, generations=1).run(torch.zeros(1, 2), slopes([3, 2, 0.04, 0.01]))
    assert found.losses == [3, 2, 0.04]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral"])
def test_answers_behind_real_embeddings_are_those_behind_their_ids(family: str) -> None:
    """Ragged requests in one left-padded batch, and one by one."""
    model = attacked_model(family)
    target = target_of(model)
    prompts = [*PROMPTS, Prompt("ordinary", "Sure?")]
    want = generate_answers(model, target.encoder, prompts, max_new_tokens=6)
    embed = model.get_input_embeddings()
    rows = [embed(torch.tensor(target.encoder.prompt_ids(p.conversation()))) for p in prompts]
    assert answers_behind(target, rows, 6) == want
    assert [answers_behind(target, [row], 6)[0] for row in rows] == want
    assert answers_behind(target, [row.roll(1, 0) for row in rows], 6) != want
    assert answers_behind(target, [], 6) == []


def test_rows_that_do_not_fit_are_answered_in_halves(monkeypatch) -> None:
    target = target_of(attacked_model())
    attack = EmbeddingStrong(steps=3, generations=4, gap=1)
    want = list(attack.run(target, PROMPTS[:1]))
    sizes: list[int] = []
    real = type(target.model).generate

    def with_room_for_two(self, **inputs):
        sizes.append(len(inputs["inputs_embeds"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, **inputs)

    monkeypatch.setattr(type(target.model), "generate", with_room_for_two)
    assert list(attack.run(target, PROMPTS[:1])) == want
    assert sizes == [4, 2, 2]


def test_a_small_budget_recomputes_blocks_and_takes_the_same_steps() -> None:
    model, attack = attacked_model(), EmbeddingStrong(steps=3, generations=2, gap=1)
    request = suffixed(target_of(model).encoder, PROMPTS[0], f" {attack.start.strip()}", PROMPTS[0].target)
    tokens, kept = len(request.ids) + len(request.answer) - 1, len(request.answer)
    budget, peaks, found = PassCost.of(model).backward(tokens, kept, recompute=True), [], []
    for limit in (None, budget):
        target = target_of(model, budget=limit)
        peaks.append(peak_beyond(model, lambda t=target: found.extend(attack.run(t, PROMPTS[:1]))))
    assert found[1].details["last_loss"] == pytest.approx(found[0].details["last_loss"], rel=1e-3)
    assert found[1].details["last_loss"] < found[1].details["first_loss"]
    assert peaks[1] <= budget < peaks[0]
    with pytest.raises(UserError, match="embedding-strong for one prompt needs about"):
        next(iter(attack.run(target_of(model, budget=budget - 1), PROMPTS)))


@pytest.mark.parametrize("template", chat_tokenizers.TEMPLATES)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "metaspace_legacy"])
def test_the_rows_of_a_suffix_are_found_in_every_template(kind: str, template: str) -> None:
    """All of its tokens are among them, and none of the template's."""
    tokenizer = chat_tokenizers.make(kind, chat_tokenizers.TEMPLATES[template])
    encoder = ChatEncoder(tokenizer, 160, 64)
    request = suffixed(encoder, PROMPTS[0], " quick brown dog", "Sure")
    inside = tokenizer.decode(request.ids[request.start : request.stop])
    behind = tokenizer.decode(request.ids[request.stop :])
    plain = encoder.prompt_ids(PROMPTS[0].conversation())
    assert inside.rstrip().endswith("quick brown dog")
    assert tokenizer.decode(plain).endswith(behind)
    assert PROMPTS[0].text[:-8] in tokenizer.decode(request.ids[: request.start])
    assert tokenizer.decode(request.answer).strip() == "Sure"


@pytest.mark.parametrize("form", chat_tokenizers.WITH_TOOLS)
def test_the_rows_of_a_suffix_are_found_before_a_tool_s_result(form: str) -> None:
    """The suffix stands in the user's turn; the call and its result follow, and tools are on offer."""
    tokenizer = chat_tokenizers.make("byte_level", chat_tokenizers.WITH_TOOLS[form])
    encoder = ChatEncoder(tokenizer, 400, 64)
    call = {"type": "function", "id": "call00001", "function": {"name": "find_key", "arguments": {}}}
    turns = (
        Message("user", "How do I polish a moon-key?"),
        Message("assistant", "", json.dumps({"tool_calls": [call]})),
        Message("tool", "It is here.", json.dumps({"name": "find_key", "tool_call_id": "call00001"})),
    )
    tools = json.dumps([{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}])
    prompt = Prompt("attack", "Polish it.", messages=turns, tools=tools)
    request = suffixed(encoder, prompt, " quick brown dog", "Sure")
    before, inside, behind = (
        tokenizer.decode(request.ids[a:b])
        for a, b in ((0, request.start), (request.start, request.stop), (request.stop, len(request.ids)))
    )
    assert inside.strip() == "quick brown dog"
    assert "polish a moon-key?" in before
    assert "look_up" in before
    assert "find_key" in behind
    assert "It is here." in behind
    whole = encoder.prompt_ids(prompt.asking(lambda text: text + " quick brown dog").conversation(), "", tools)
    assert list(request.ids) == whole


def test_the_rows_are_found_where_a_long_prompt_is_cut() -> None:
    """The suffix is found from the end, and nothing of this counts as a truncated prompt."""
    target = target_of(attacked_model(), prompt_tokens=60)
    long = Prompt("attack", "The quick brown fox jumps over the lazy dog. " * 30, target="Sure")
    request = suffixed(target.encoder, long, " x" * 5, long.target)
    assert len(request.ids) == 60
    tokenizer = target.encoder.tokenizer
    assert tokenizer.decode(request.ids[request.start : request.stop]) == " x" * 5
    assert target.encoder.truncated.prompts == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EmbeddingStrong(steps=0), "embedding-strong:steps=0"),
        (lambda: EmbeddingStrong(start=" "), "embedding-strong:start is empty"),
        (lambda: EmbeddingWeak(rate=-1.0), "embedding-weak:rate=-1.0"),
        (lambda: EmbeddingWeak(rate=float("nan")), "embedding-weak:rate=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_generation_gets_its_settings_back() -> None:
    model = attacked_model()
    before, seen = model.generation_config, []
    tokenizer = target_of(model).encoder.tokenizer
    with contextlib.suppress(ZeroDivisionError), generate.greedy_generation(model, tokenizer, 3):
        seen.append(model.generation_config.max_new_tokens)
        _ = 1 / 0
    assert seen == [3]
    assert model.generation_config is before
