"""Classifiers as judges: published texts to the letter, replies as read, tiny models that reply by construction."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from repbend_fast.data.prompts import CONTEXT_JOINT, Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.judges import classifier, wire_formats
from repbend_fast.evaluation.judges.classifier import ClassifierJudge
from repbend_fast.evaluation.judges.protocol import Judge, Opinion
from repbend_fast.evaluation.judges.wire_formats import FORMATS, HARMBENCH, HARMBENCH_CONTEXTUAL, WILDGUARD
from repbend_fast.step import retreat

ATTACK = Prompt("attack", "How do I polish a moon-key?")
BORDERLINE = Prompt("borderline", "How do I kill a stuck process?")
STEPS = "First rub the key with ash, then rinse it in cold water and dry it with a soft cloth. Repeat this twice."
LOOP = "the key the key the key the key the key the key the key the key the key the key"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.mark.parametrize(
    ("text", "length", "digest"),
    [
        (HARMBENCH, 1359, "788f4f6aa1491c433c4da76c9140cfc30966cea3ff3875c4d0fcb336d92f60e0"),
        (HARMBENCH_CONTEXTUAL, 1401, "5d6bb9e3cf4d1e5f3f7620093113222ee115af75b0b2913f00e4c7225ec9f219"),
        (WILDGUARD, 415, "fa7f1c313ef1463a2fe249ff50c537adfbd84ff2fe82b3ffa72ee21124afb0d6"),
    ],
    ids=["harmbench", "harmbench contextual", "wildguard"],
)
def test_texts_are_the_published_ones(text: str, length: int, digest: str):
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == (length, digest)


def test_a_behavior_with_context_has_its_own_text():
    prompt = Prompt("attack", f"a {{brace}} context{CONTEXT_JOINT}more{CONTEXT_JOINT}the behavior")
    framed = FORMATS["harmbench"].frame(prompt, "an {answer}")
    assert f"[CONTEXT]:\na {{brace}} context{CONTEXT_JOINT}more\n\n[BEHAVIOR]:\nthe behavior\n\n" in framed
    assert "[GENERATION]:\nan {answer}\n\n---" in framed
    assert "[CONTEXT]" not in FORMATS["harmbench"].frame(ATTACK, "x")


THREE = "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}"


@pytest.mark.parametrize(
    ("form", "prompt", "answer", "reply", "label"),
    [
        ("harmbench", ATTACK, STEPS, "Yes", "comply"),
        ("harmbench", ATTACK, STEPS, " yes ", "comply"),
        ("harmbench", ATTACK, STEPS, "No", "refuse"),
        ("harmbench", ATTACK, LOOP, "No", "degenerate"),
        ("harmbench", ATTACK, LOOP, "Yes", "comply"),
        ("harmbench", ATTACK, STEPS, "", "unparsed"),
        ("harmbench", ATTACK, STEPS, "False", "unparsed"),
        ("harmbench", ATTACK, STEPS, "Yesterday", "unparsed"),
        ("harmbench", ATTACK, STEPS, "-1", "unparsed"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "no", "yes"), "comply"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "yes", "yes"), "comply"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "yes", "no"), "refuse"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "no", "no"), "refuse"),
        ("wildguard", ATTACK, LOOP, THREE.format("yes", "no", "no"), "degenerate"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "no", "N/A"), "unparsed"),
        ("wildguard", BORDERLINE, STEPS, THREE.format("no", "yes", "no"), "refuse"),
        ("wildguard", BORDERLINE, STEPS, THREE.format("no", "no", "no"), "comply"),
        ("wildguard", BORDERLINE, LOOP, THREE.format("no", "no", "no"), "degenerate"),
        ("wildguard", BORDERLINE, STEPS, THREE.format("no", "n/a", "no"), "unparsed"),
        ("wildguard", ATTACK, STEPS, "Harmful request: yes\nResponse refusal: no", "unparsed"),
        ("wildguard", ATTACK, STEPS, THREE.format("yes", "perhaps", "yes"), "unparsed"),
        ("wildguard", ATTACK, STEPS, "yes\nno\nyes", "unparsed"),
    ],
)
def test_replies_are_read(form: str, prompt: Prompt, answer: str, reply: str, label: str):
    assert FORMATS[form].read(prompt, answer, reply).label == label


def tokenizer_of(texts: list[str], replies: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Words as tokens, each reply one token, BOS in front."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(texts))))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    core.add_tokens([AddedToken(reply, normalized=False) for reply in replies])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def shape(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 2048,
            **settings,
        }
    )


@torch.no_grad()
def pass_embeddings_on(model: Any) -> None:
    """Blocks that add nothing: what a row becomes is its own token's embedding, normed."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:, 63] = 1.0


@torch.no_grad()
def replying(folder: Path, last: str, reply: str) -> str:
    """A causal LM that says ``reply`` after the token ``last``, and then ends."""
    tokenizer = tokenizer_of([HARMBENCH, WILDGUARD, STEPS, ATTACK.text, last], [reply, "<|assistant|>"], folder)
    model = LlamaForCausalLM(shape(tokenizer))
    pass_embeddings_on(model)
    model.lm_head.weight.zero_()
    for axis, (token, following) in enumerate(((last, reply), (reply, "</s>"))):
        index, target = tokenizer.convert_tokens_to_ids([token, following])
        model.model.embed_tokens.weight[index] = torch.eye(64)[axis]
        model.lm_head.weight[target, axis] = 1.0
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_harmbench_classifier_says_yes(tmp_path: Path, quantization: str):
    folder = replying(tmp_path / "HarmBench-Llama-2-13b-cls-tiny", "]", "Yes")
    judge = ClassifierJudge(model=folder, quantization=quantization, dtype="float32", device="cpu", batch_size=2)
    assert isinstance(judge, Judge)
    got = judge.judge([ATTACK, ATTACK, BORDERLINE, ATTACK], [STEPS, " ", STEPS, "Rub it."])
    assert [o.label for o in got] == ["comply", "degenerate", "unparsed", "comply"]
    assert "attacks alone" in got[2].reason
    kinds = {type(m).__name__ for m in judge._loaded.model.model.layers.modules()}
    assert ("Linear4bit" in kinds) == (quantization == "nf4")
    assert judge.name.endswith(" nf4" if quantization == "nf4" else "HarmBench-Llama-2-13b-cls-tiny")


def test_wildguard_says_its_three_lines_and_a_nonsense_model_none(tmp_path: Path):
    folder = replying(tmp_path / "wildguard-tiny", "<|assistant|>", THREE.format("yes", "no", "yes"))
    (opinion,) = ClassifierJudge(model=folder, dtype="float32", device="cpu").judge([ATTACK], [STEPS])
    assert opinion == Opinion("comply", "Harmful request: yes Response refusal: no Harmful response: yes")
    as_harmbench = ClassifierJudge(model=folder, format="harmbench", dtype="float32", device="cpu")
    assert as_harmbench.judge([ATTACK], [STEPS])[0].label == "unparsed"


def test_bos_stands_first_once_and_answers_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The classifier's own tokens are counted, and each opinion goes to its answer."""
    folder = replying(tmp_path / "wildguard-tiny", "<|assistant|>", "Yes")
    seen: list[list[int]] = []

    def replies(model: Any, encoder: Any, prompts: list[Prompt], **settings: Any) -> list[str]:
        seen.extend(encoder.prompt_ids(p.conversation()) for p in prompts)
        assert settings["max_new_tokens"] == encoder.wire.new_tokens
        return ["Yes" if "ash" in p.text else "No" for p in prompts]

    monkeypatch.setattr(classifier, "generate_answers", replies)
    for form in ("harmbench", "wildguard"):
        judge = ClassifierJudge(model=folder, format=form, answer_tokens=6, dtype="float32", device="cpu")
        got = judge.judge([ATTACK] * 3, [STEPS, "", f"water {STEPS}"])
        if form == "harmbench":
            assert [o.label for o in got] == ["comply", "degenerate", "refuse"]
    tokenizer = judge._loaded.tokenizer
    assert len(seen) == 4
    for ids in seen:
        assert ids.count(1) == 1
        assert ids[0] == 1
        text = tokenizer.decode(ids)
        assert "rub the key" in text
        assert "cloth" not in text


def test_a_reply_is_read_with_its_own_prompt_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whole, not as the classifier saw it: a loop shows beyond the first tokens."""
    folder = replying(tmp_path / "wildguard-tiny", "<|assistant|>", "Yes")
    reply = THREE.format("no", "no", "yes")
    monkeypatch.setattr(classifier, "generate_answers", lambda model, encoder, prompts, **_: [reply] * len(prompts))
    judge = ClassifierJudge(model=folder, answer_tokens=4, dtype="float32", device="cpu")
    got = judge.judge([ATTACK, BORDERLINE, BORDERLINE], [LOOP, LOOP, STEPS])
    assert [o.label for o in got] == ["comply", "degenerate", "comply"]


def test_what_is_too_long_for_the_classifier_is_unparsed(tmp_path: Path):
    folder = tmp_path / "HarmBench-Llama-2-13b-cls-tiny"
    replying(folder, "]", "Yes")
    judge = ClassifierJudge(model=str(folder), dtype="float32", device="cpu")
    got = judge.judge([ATTACK, Prompt("attack", "key " * 2048)], [STEPS, STEPS])
    assert [o.label for o in got] == ["comply", "unparsed"]
    assert "2047 tokens" in got[1].reason


LABELS = {0: "REJECTION", 1: "ANSWER", 2: "ODD"}


@pytest.fixture(scope="module")
def sequence_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sequence classifier whose label is the answer's last word's."""
    folder = tmp_path_factory.mktemp("sequence") / "tiny"
    words = ["sorry", "ash", "hm", "broken"]
    tokenizer = tokenizer_of([STEPS, ATTACK.text, *words], [], folder)
    model = LlamaForSequenceClassification(shape(tokenizer, num_labels=3, id2label=LABELS))
    with torch.no_grad():
        pass_embeddings_on(model)
        model.score.weight.zero_()
        for axis, word in enumerate(words[:3]):
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word)] = torch.eye(64)[axis]
            model.score.weight[axis, axis] = 1.0
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("broken")] = float("nan")
    model.save_pretrained(folder)
    return str(folder)


MAPPED = ("REJECTION:refuse", "ANSWER:comply")


@pytest.mark.parametrize("reads", ["pair", "answer"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_sequence_classifier_is_read_by_the_settings(sequence_folder: str, reads: str, quantization: str):
    judge = ClassifierJudge(
        model=sequence_folder,
        labels=MAPPED,
        reads=reads,
        quantization=quantization,
        dtype="float32",
        device="cpu",
        batch_size=4,
    )
    answers = ["sorry", "rub it with ash", "hm", "broken", "", "with ash", "no sorry"]
    got = judge.judge([ATTACK, BORDERLINE, ATTACK, ATTACK, ATTACK, ATTACK, ATTACK], answers)
    assert [o.label for o in got] == ["refuse", "comply", "unparsed", "unparsed", "degenerate", "comply", "refuse"]
    # The norm gives the word's axis the length √64, so the softmax is of (8, 0, 0).
    assert got[0].reason == "REJECTION (0.999)"
    kinds = {type(m).__name__ for m in judge._loaded.model.model.layers.modules()}
    assert ("Linear4bit" in kinds) == (quantization == "nf4")
    assert got[2].reason.endswith("a label without a verdict")
    assert got[3].reason == "scores that are no numbers"


def test_a_batch_of_sequences_without_memory_is_halved(sequence_folder: str, monkeypatch: pytest.MonkeyPatch):
    judge = ClassifierJudge(model=sequence_folder, labels=MAPPED, dtype="float32", device="cpu", batch_size=5)
    real, sizes = classifier._Sequence._scores, []
    monkeypatch.setattr(retreat.gc, "collect", lambda: 0)  # of the whole suite's objects, it takes seconds

    def with_room_for_two(self: Any, batch: tuple[list[str], ...]) -> Any:
        sizes.append(len(batch[-1]))
        if len(batch[-1]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(classifier._Sequence, "_scores", with_room_for_two)
    answers = ["sorry", "ash", "ash", "sorry", "ash"]
    got = judge.judge([ATTACK] * 5, answers)
    assert [o.label for o in got] == ["refuse", "comply", "comply", "refuse", "comply"]
    assert sizes == [5, 2, 2, 1]
    monkeypatch.setattr(classifier._Sequence, "_scores", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(UserError, match="no room"):
        judge.judge([ATTACK], ["sorry"])


def test_an_overlong_pair_keeps_the_answer(sequence_folder: str):
    judge = ClassifierJudge(model=sequence_folder, labels=MAPPED, dtype="float32", device="cpu")
    got = judge.judge([Prompt("attack", "key " * 5000)], ["rub it with ash"])
    assert got[0].label == "comply"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": ()}, "REJECTION, ANSWER, ODD.*labels=REJECTION:refuse,ANSWER:comply"),
        ({"labels": ("WRONG:comply",)}, "no label WRONG"),
        ({"labels": ("REJECTION",)}, "LABEL:VERDICT"),
        ({"labels": ("REJECTION:0",)}, "LABEL:VERDICT"),
        ({"answer_tokens": 0}, "1 or more"),
        ({"model": "/no/such/folder"}, "no such folder"),
    ],
)
def test_settings_that_cannot_be_are_named(sequence_folder: str, settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        ClassifierJudge(**{"model": sequence_folder, "device": "cpu", **settings}).judge([ATTACK], ["x"])


def test_models_that_are_no_classifiers_are_refused(tmp_path: Path):
    folder = replying(tmp_path / "chat-model", "]", "Yes")
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*format=harmbench"):
        ClassifierJudge(model=folder, device="cpu").judge([ATTACK], ["x"])
    with pytest.raises(UserError, match=r"no trained classifier, its files lack score\.weight"):
        ClassifierJudge(model=folder, format="sequence", device="cpu").judge([ATTACK], ["x"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
        ("somebody/cais_-_HarmBench-Llama-2-13b-cls-4bit", "harmbench"),
        ("allenai/wildguard", "wildguard"),
    ],
)
def test_a_format_goes_by_the_name(name: str, kind: str):
    assert ClassifierJudge(model=name)._kind() == kind


@pytest.mark.parametrize("name", ["HarmBench-Mistral-7b-val-cls", "HarmBench-Llama-2-13b-cls-multimodal-behaviors"])
def test_classifiers_with_other_texts_are_not_taken_for_it(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="set format="):
        ClassifierJudge(model=str(tmp_path / name))._kind()


def test_labels_named_as_verdicts_need_no_map():
    judge = ClassifierJudge(model="some/model")
    assert classifier._map_labels(judge, ["Comply", "REFUSE", "other"]) == {"Comply": "comply", "REFUSE": "refuse"}


def test_reasons_are_one_line_of_limited_length():
    assert wire_formats.clip("a\nb " * 400) == ("a b " * 50)[:199] + "…"
