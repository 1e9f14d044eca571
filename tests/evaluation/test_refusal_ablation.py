"""Refusal ablation finds the direction that was put into a model, chooses its state on validation prompts, and answers
without it.
"""

from __future__ import annotations

import json

import pytest
import torch
from attacked_models import PROMPTS, attacked_model, peak_beyond, target_of

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.refusal_ablation import RefusalAblation, Requests, _cut
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.models import find_decoder
from repbend_fast.models.ablation import projected_out

FEW = RefusalAblation(count=8, validation=4, kl_limit=10.0)
MARK = "@"


def marked_model():
    """A model in which the token "@" in a request writes a known direction into every later row's stream, and that
    direction raises one token's logit: a refusal that is known.

    Block 1 attends to the mark alone (its queries and keys read one coordinate that only the mark's embedding has) and
    writes coordinate 63 where it finds it, which the head reads as "I".
    """
    model = attacked_model(dtype=torch.float64)
    target = target_of(model)
    (mark,) = target.encoder.tokenizer(MARK, add_special_tokens=False)["input_ids"]
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 60:] = 0
        embedding[mark, 62] = 3.0
        # A coordinate that is the same in every row, so that every query looks for the mark.
        embedding[:, 61] = 1.0
        for number, block in enumerate(find_decoder(model).layers):
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight[60:] = 0
            if number == 1:
                block.self_attn.o_proj.weight.zero_()
                for name, source in (("q_proj", 61), ("k_proj", 62), ("v_proj", 62)):
                    weight = getattr(block.self_attn, name).weight
                    weight[:head] = 0
                    # The last pair of a head turns slowest, so positions hardly matter to it.
                    weight[head // 2 - 1, source] = 6.0
                block.self_attn.o_proj.weight[63, head // 2 - 1] = 4.0
        (refused,) = target.encoder.tokenizer("I", add_special_tokens=False)["input_ids"]
        model.lm_head.weight[:, 63] = 0
        model.lm_head.weight[refused, 63] = 6.0
    assert width == 64
    return model


def files(folder) -> dict[str, str]:
    """Two files of prompts that differ in the mark."""
    words = ["polish a key", "jump over a dog", "help a fox", "cut a lantern", "do that at home", "read a lazy book"]
    paths = {}
    for name, kind, mark in (("harmful", "attack", f" {MARK}"), ("harmless", "ordinary", "")):
        rows = [{"kind": kind, "text": f"How do I {w}{mark}?", "item": w.split()[-1]} for w in words]
        paths[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return paths


def test_the_direction_that_was_put_in_is_found(tmp_path) -> None:
    """Means at the last prompt token differ along coordinate 63 at states 2 and 3; without it the mark changes nothing
    that the answer reads.
    """
    model = marked_model()
    target = target_of(model)
    requests = Requests(target)
    attack = RefusalAblation(**files(tmp_path), count=4, validation=2, kl_limit=50.0, state=2)
    chosen = attack._choose(model, requests, attack._prompts("harmful", 0), attack._prompts("harmless", 0))
    unit = chosen.direction / chosen.direction.norm()
    plain, marked = (Prompt("attack", f"Tell me how it is{m}.") for m in ("", f" {MARK}"))
    states = requests.last_states([plain, marked])
    assert states.shape == (find_decoder(model).num_blocks, 2, 64)
    grown = states[2, 1, 63] - states[2, 0, 63]
    assert grown > 1.0
    assert unit[63] > 0.5, "the sign is harmful less harmless"
    with projected_out(model, chosen.direction):
        without = requests.last_states([plain, marked])
    # The first state is read before the first block's projection.
    for state in without[1:]:
        assert (state @ unit.float()).abs().max() < 1e-5


def test_refused_requests_are_answered_again(tmp_path) -> None:
    """A complying beginning's mean log-probability is less than two thirds of what it was, and harmless prompts change
    little.
    """
    model = marked_model()
    target = target_of(model)
    attack = RefusalAblation(**files(tmp_path), count=4, validation=2, kl_limit=1.0)
    (result,) = attack.run(target, [Prompt("attack", f"Tell me how it is {MARK}.")])
    held = _cut(attack._prompts("harmful", 0), 4, 2)[1]
    before = Requests(target).complying(held)
    assert result.details["log_prob"] > before / 1.5
    assert result.details["kl"] < 1.0


def test_hidden_states_are_those_of_each_prompt_alone() -> None:
    model = attacked_model()
    requests = Requests(target_of(model, batch_size=3))
    prompts = [*PROMPTS, Prompt("ordinary", "Sure?"), Prompt("ordinary", "I can not help with that.")]
    got = requests.last_states(prompts)
    for number, prompt in enumerate(prompts):
        states = model(torch.tensor([requests.ids(prompt)]), output_hidden_states=True).hidden_states
        want = torch.stack([state[0, -1] for state in states[:-1]])
        assert torch.allclose(got[:, number], want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got[:, number - 1], want, rtol=1e-1, atol=1e-1)


def test_complying_answers_are_scored_as_each_alone() -> None:
    model = attacked_model()
    requests = Requests(target_of(model))
    alone = []
    for prompt in PROMPTS:
        ids = list(requests.ids(prompt))
        encoder = target_of(model).encoder
        answer = encoder.prompt_ids(prompt.conversation(), prompt.target)[len(ids) :]
        logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        alone.append(float(logits.log_softmax(-1)[range(len(answer)), answer].mean()))
    assert requests.complying(PROMPTS) == pytest.approx(sum(alone) / 2, rel=1e-4)
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)


def test_the_state_is_chosen_on_validation_prompts(tmp_path) -> None:
    """The likeliest complying answers among those that leave harmless prompts alone; the mildest if none does."""
    model = attacked_model()
    target = target_of(model)
    requests = Requests(target)
    harmful, harmless = FEW._prompts("harmful", 0), FEW._prompts("harmless", 0)
    single = [
        RefusalAblation(count=8, validation=4, kl_limit=10.0, state=state)._choose(model, requests, harmful, harmless)
        for state in (1, 2, 3)
    ]
    free = FEW._choose(model, requests, harmful, harmless)
    assert free.score == max(d.score for d in single)
    # A random model refuses nothing, so the one with a known refusal shows this.
    refusing, known = marked_model(), RefusalAblation(**files(tmp_path), count=4, validation=2, kl_limit=10.0)
    asked, refused = Requests(target_of(refusing)), known._prompts("harmful", 0)
    found = known._choose(refusing, asked, refused, known._prompts("harmless", 0))
    assert found.score > asked.complying(_cut(refused, 4, 2)[1]), "complying answers become likelier"
    limits = sorted(d.kl for d in single)
    strict = RefusalAblation(count=8, validation=4, kl_limit=limits[0] / 2)._choose(model, requests, harmful, harmless)
    assert strict.kl == limits[0]
    between = RefusalAblation(count=8, validation=4, kl_limit=(limits[0] + limits[1]) / 2)
    assert between._choose(model, requests, harmful, harmless).kl == limits[0]


def test_answers_are_those_without_the_direction() -> None:
    model = attacked_model()
    target = target_of(model)
    results = list(FEW.run(target, PROMPTS))
    assert [r.index for r in results] == [0, 1]
    chosen = FEW._choose(model, Requests(target), FEW._prompts("harmful", 0), FEW._prompts("harmless", 0))
    assert results[0].details == chosen.details()
    with projected_out(model, chosen.direction):
        want = generate_answers(model, target.encoder, PROMPTS, max_new_tokens=6)
    assert [r.answers for r in results] == [(answer,) for answer in want]
    assert want != generate_answers(model, target.encoder, PROMPTS, max_new_tokens=6)
    (alone,) = FEW.run(target, PROMPTS[1:])
    assert (alone.answers, alone.details) == (results[1].answers, results[1].details)


def test_passes_keep_the_budget() -> None:
    model, budget, peaks = attacked_model(), 1 << 20, []
    for limit in (None, budget):
        requests = Requests(target_of(model, budget=limit, batch_size=32))
        peaks.append(peak_beyond(model, lambda r=requests: r.complying([*PROMPTS] * 10)))
    assert peaks[1] <= budget < peaks[0]


@pytest.mark.parametrize(("total", "sizes"), [(200, (128, 32)), (140, (108, 32)), (40, (20, 20)), (2, (1, 1))])
def test_few_prompts_are_shared(total: int, sizes: tuple[int, int]) -> None:
    assert tuple(map(len, _cut([PROMPTS[0]] * total, 128, 32))) == sizes


def test_bad_settings_are_said(tmp_path) -> None:
    target = target_of(attacked_model())
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"kind": "ordinary", "text": "Hello?"}]), encoding="utf-8")
    for attack, words in (
        (RefusalAblation(harmful=str(path)), "refusal-ablation:harmful=.*0 prompts of kind attack"),
        (RefusalAblation(state=9), "refusal-ablation:state=9; this model's hidden states to choose from are 1 … 3"),
    ):
        with pytest.raises(UserError, match=words):
            next(iter(attack.run(target, PROMPTS)))
    with pytest.raises(UserError, match="refusal-ablation:deepest=2"):
        RefusalAblation(deepest=2.0)
    assert list(RefusalAblation(harmful="nowhere").run(target, [])) == []
