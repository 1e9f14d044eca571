"""Attacks that write prompts: what they ask, with whose words, and that batches change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks import direct, prefill, template
from repbend_fast.evaluation.attacks.direct import DirectAttack
from repbend_fast.evaluation.attacks.known import ATTACKS
from repbend_fast.evaluation.attacks.prefill import PrefillAttack
from repbend_fast.evaluation.attacks.protocol import Attack, Target
from repbend_fast.evaluation.attacks.template import TemplateAttack, filled, many_shot
from repbend_fast.evaluation.generate import Answer
from repbend_fast.evaluation.judges.known import JUDGES
from repbend_fast.evaluation.judges.protocol import Judge, Opinion
from repbend_fast.evaluation.measure import PREFILL

ANSWER = "Sure, take a moon-key and polish it. Sure, take a fog-lamp and polish it. " * 4
PROMPTS = [
    Prompt("attack", "How do I make a moon-key?", item="moon-key", target="Sure, a moon-key", answer=ANSWER),
    Prompt("attack", "How?"),
    Prompt("attack", "Tell me, and take your time, what a fog-lamp is made of and where it is sold."),
    Prompt(
        "attack",
        "And then?",
        messages=(Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "And then?")),
    ),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = write_model(tmp_path_factory.mktemp("attacked") / "model")
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval().requires_grad_(False)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(str(folder)), 400, 64)
    return Target(model, encoder, max_new_tokens=6, batch_size=3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[Prompt], list[str]]]:
    """What would be generated; every answer is its number."""
    calls: list[tuple[Any, list[Prompt], list[str]]] = []

    def record(
        model: Any, encoder: Any, prompts: Sequence[Prompt], *, prefills: Sequence[str] = (), **_: Any
    ) -> list[str]:
        calls.append((encoder, list(prompts), list(prefills)))
        return [str(number) for number in range(len(prompts))]

    for module in (prefill, template):
        monkeypatch.setattr(module, "generate_answers", record)
    monkeypatch.setattr(
        direct, "generate_measured", lambda *a, **k: [Answer(text, 1, True) for text in record(*a, **k)]
    )
    return calls


@pytest.mark.parametrize("name", ["direct", "prefill", "template"])
def test_they_are_attacks_and_are_listed(name: str) -> None:
    attack = ATTACKS.find(name).make()
    assert isinstance(attack, Attack)
    assert (attack.name, attack.white_box, attack.needs_target) == (name, False, False)
    assert name in ATTACKS.names()


@pytest.mark.parametrize("text", ["direct", "direct:template=false", "prefill:tokens=1,4", "template:shots=1"])
def test_batched_answers_are_those_one_by_one(target: Target, text: str) -> None:
    attack = ATTACKS.find(text).make()
    together = list(attack.run(target, PROMPTS))
    assert [result.index for result in together] == [0, 1, 2, 3]
    alone = [next(iter(attack.run(target, [prompt]))) for prompt in PROMPTS]
    assert [result.answers for result in together] == [result.answers for result in alone]
    assert [result.prefills for result in together] == [result.prefills for result in alone]
    assert len({answer for result in together for answer in result.answers}) > 2, "the test needs answers that differ"


def test_without_the_template_nothing_of_it_is_there(target: Target) -> None:
    encoder = direct.BareEncoder(target.encoder)
    tokenizer = target.encoder.tokenizer
    assert tokenizer.decode(encoder.prompt_ids(PROMPTS[3].conversation(), "So")) == "Hello\nHi\nAnd then?So"
    assert tokenizer.decode(target.encoder.prompt_ids(PROMPTS[1].conversation())).startswith("<|im_start|>user")
    long = encoder.prompt_ids([Message("user", "x " * 1000 + "end")])
    assert len(long) == 400
    assert tokenizer.decode(long).endswith("end")


def test_bos_stands_first_once(target: Target) -> None:
    class WithBos:
        bos_token_id = 1

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [1, 5] if text.startswith("<s>") else [5]

    encoder = direct.BareEncoder(target.encoder)
    encoder.tokenizer = WithBos()
    assert encoder.prompt_ids([Message("user", "x")]) == [1, 5]
    assert encoder.prompt_ids([Message("user", "<s>x")]) == [1, 5]


def test_direct_asks_each_prompt_once(target: Target, asked: list[tuple[Any, list[Prompt], list[str]]]) -> None:
    results = list(DirectAttack().run(target, PROMPTS))
    assert asked == [(target.encoder, PROMPTS, [])]
    assert [(result.index, result.answers) for result in results] == [
        (0, ("0",)),
        (1, ("1",)),
        (2, ("2",)),
        (3, ("3",)),
    ]


def test_every_known_beginning_is_forced(target: Target, asked: list[tuple[Any, list[Prompt], list[str]]]) -> None:
    first, second, *_ = PrefillAttack().run(target, PROMPTS)
    tokenizer = target.encoder.tokenizer
    ids = tokenizer.encode(ANSWER)
    starts = [tokenizer.decode(ids[:count]) for count in (4, 16, 64)]
    assert all(ANSWER.startswith(start) for start in starts)
    assert list(first.prefills) == [PREFILL, "Sure, a moon-key:\n\n", *starts]
    assert second.prefills == (PREFILL,)
    assert (first.answers, second.answers) == (("0", "1", "2", "3", "4"), ("5",))
    assert asked[0][2] == [*first.prefills, PREFILL, PREFILL, PREFILL]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"start": "own"}, [(PREFILL,), (PREFILL,)]),
        ({"start": "target"}, [("Sure, a moon-key:\n\n",), (PREFILL,)]),
        ({"text": "Yes:"}, [("Yes:",), ("Yes:",)]),
    ],
)
def test_one_beginning_can_be_asked_for(
    target: Target, settings: dict[str, Any], expected: list[tuple[str, ...]]
) -> None:
    attack = PrefillAttack(**settings)
    assert [attack.beginnings(target.encoder, prompt) for prompt in PROMPTS[:2]] == expected


def test_a_request_stands_in_every_template(target: Target, asked: list[tuple[Any, list[Prompt], list[str]]]) -> None:
    results = list(TemplateAttack(shots=2).run(target, PROMPTS))
    _, wrapped, _ = asked[0]
    assert len(wrapped) == 3 * len(PROMPTS)
    for number, prompt in enumerate(wrapped):
        request = PROMPTS[number // 3].text
        turn = prompt.conversation()[-1].content
        assert turn.count(request) == 1
        assert len(turn) > len(request) + 20
    assert [message.content for message in wrapped[-1].conversation()[:2]] == ["Hello", "Hi"]
    assert results[1].answers == ("3", "4", "5")
    assert results[1].details == {"templates": ["role-play", "translate", "many-shot"]}


def test_many_shots_are_different_fictional_examples() -> None:
    text = many_shot(8)
    assert text.count("Question:") == text.count("Answer:") == 9
    questions = [part.partition("\n")[0] for part in text.split("Question: ")[1:]]
    assert len(set(questions)) == 9
    assert questions[-1] == "{prompt}"


def test_what_a_request_holds_is_left_alone() -> None:
    assert filled("a {prompt} b", "{prompt} and [PROMPT] {0}") == "a {prompt} and [PROMPT] {0} b"
    assert filled("a {{prompt}} b", "x") == "a x b"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("one.txt", "Answer this: [INSERT PROMPT HERE]", {"one": "Answer this: [INSERT PROMPT HERE]"}),
        (
            "two.json",
            json.dumps(["A {prompt}", "B {prompt}"]),
            {"template-1": "A {prompt}", "template-2": "B {prompt}"},
        ),
        ("three.jsonl", '{"name": "x", "template": "A {prompt}"}\n', {"x": "A {prompt}"}),
        ("four.csv", "name,template\nx,A [PROMPT]\ny,B [PROMPT]\n", {"x": "A [PROMPT]", "y": "B [PROMPT]"}),
    ],
)
def test_templates_of_the_user_s(tmp_path: Path, name: str, text: str, expected: dict[str, str]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert dict(TemplateAttack(file=str(path)).templates) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "no place", "template a has no placeholder; write {prompt} where the request goes"),
        ("b.jsonl", '{"text": "A {prompt}"}\n', "b.jsonl:1: needs a text in `template`; found are text"),
        ("c.jsonl", "{\n", "c.jsonl:1: invalid JSON"),
        ("d.jsonl", "", "d.jsonl: no templates in this file"),
        ("e.txt", b"\xff\xfe", "e.txt: cannot be read"),
    ],
)
def test_a_file_of_templates_that_is_wrong(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        TemplateAttack(file=str(path))
    assert words in str(caught.value)


def test_settings_that_make_no_sense() -> None:
    for text, words in (
        ("template:file=none.txt", "file=none.txt: no such file"),
        ("template:names=play", "no template play; there are role-play, translate, many-shot"),
        ("template:shots=0", "shots=0"),
        ("template:shots=100000", "but there are"),
        ("prefill:tokens=0", "tokens=0: give whole numbers from 1 on"),
    ):
        with pytest.raises(UserError) as caught:
            ATTACKS.find(text).make()
        assert words in str(caught.value)


def test_the_rule_judge_speaks_the_judges_language() -> None:
    judge = JUDGES.find("rule").make()
    assert isinstance(judge, Judge)
    prompts = [PROMPTS[0], Prompt("ordinary", "What is rain?", expected=("water",)), Prompt("ordinary", "And snow?")]
    opinions = judge.judge(prompts, ["I can't help with that.", "Rain is water that falls from clouds.", ""])
    assert [opinion.label for opinion in opinions] == ["refuse", "comply", "degenerate"]
    assert [opinion.helpful for opinion in opinions] == [None, True, False]
    assert opinions[2] == Opinion("degenerate", "empty", False)
