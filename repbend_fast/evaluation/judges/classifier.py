"""Hugging Face classifiers as judges: HarmBench's, WildGuard, and any sequence classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch

from repbend_fast.config.schema import ModelConfig
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError, one_line
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.evaluation.halving import Chunks
from repbend_fast.evaluation.judges.protocol import JUDGED, Judged, Opinion
from repbend_fast.evaluation.judges.wire_formats import FORMATS, WireFormat, empty
from repbend_fast.models.causal import CausalLM, SequenceClassifier
from repbend_fast.models.load import load_model, load_sequence_classifier, load_tokenizer, read_model_config

if TYPE_CHECKING:
    from transformers import BatchEncoding

Format = Literal["auto", "harmbench", "wildguard", "sequence"]
NO_LIMIT = 1 << 20
"""Tokenizers that know no length say a number beyond this one."""


class ClassifierJudge:
    """A classifier from the hub or a folder, loaded when it is first asked.

    Args:
        model: hub name or folder.
        format: what it reads and how it replies; ``auto`` goes by its name, then by its architecture.
        labels: for a sequence classifier, ``its label:comply|refuse|degenerate`` for each label that is a verdict; one
            that is not named is ``unparsed``. Empty where its labels have these names already.
        reads: whether a sequence classifier reads prompt and answer as a pair, or the answer alone.
        answer_tokens: an answer is clipped to this many of the classifier's own tokens, the published 512.
        quantization: ``nf4`` loads it in 4 bits.
        batch_size: halved where memory runs out.
    """

    def __init__(
        self,
        *,
        model: str = "cais/HarmBench-Llama-2-13b-cls",
        format: Format = "auto",
        labels: tuple[str, ...] = (),
        reads: Literal["pair", "answer"] = "pair",
        answer_tokens: int = 512,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        quantization: Literal["none", "nf4"] = "none",
        device: str = "auto",
        batch_size: int = 8,
    ) -> None:
        if answer_tokens < 1 or batch_size < 1:
            raise UserError("judge classifier: answer_tokens and batch_size have to be 1 or more")
        self.name = f"classifier:{model}{f'@{revision}' if revision else ''}{' nf4' if quantization == 'nf4' else ''}"
        self.format = format
        self.reads = reads
        self.answer_tokens = answer_tokens
        self.batch_size = batch_size
        self.labels = _read_labels(labels)
        self.config = ModelConfig(name=model, revision=revision, dtype=dtype, quantization=quantization, device=device)
        self._loaded: _Generative | _Sequence | None = None

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        """One opinion for each answer, in order; empty answers are ``degenerate`` and not asked about."""
        found = [empty(answer) for _, answer in zip(prompts, answers, strict=True)]
        asked = [i for i, opinion in enumerate(found) if opinion is None]
        if asked:
            replies = self._classifier().opinions([prompts[i] for i in asked], [answers[i] for i in asked])
            for i, opinion in zip(asked, replies, strict=True):
                found[i] = opinion
        return [opinion or Opinion("unparsed") for opinion in found]

    def _classifier(self) -> _Generative | _Sequence:
        if self._loaded is None:
            kind = self._kind()
            if kind == "sequence":
                self._loaded = _Sequence(self)
            else:
                self._loaded = _Generative(self, FORMATS[kind])
        return self._loaded

    def _kind(self) -> str:
        if self.format != "auto":
            return self.format
        name = self.config.name.rsplit("/", 1)[-1].lower()
        named = [kind for kind, wire in FORMATS.items() if re.search(wire.names, name)]
        if named:
            return named[0]
        try:
            architectures = read_model_config(self.config).architectures or ()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"judge {self.name}: its configuration cannot be read ({one_line(error)})") from error
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            return "sequence"
        raise UserError(
            f"judge {self.name}: neither HarmBench-Llama-2-13b-cls nor WildGuard by its name, and no sequence "
            f"classifier ({', '.join(architectures) or 'no architecture'}); set format={'|'.join(FORMATS)} if it "
            "speaks one of these formats, or serve it and use the endpoint judge"
        )


class Batching(Protocol):
    """A tokenizer of transformers, as it is asked for a padded batch of texts or of pairs."""

    def __call__(
        self, *texts: list[str], padding: bool, truncation: str, max_length: int, return_tensors: str
    ) -> BatchEncoding: ...


class _Generative:
    """A causal LM that replies in words."""

    def __init__(self, judge: ClassifierJudge, wire: WireFormat) -> None:
        self.wire = wire
        self.batch_size = judge.batch_size
        self.answer_tokens = judge.answer_tokens
        self.tokenizer = load_tokenizer(judge.config)
        self.model = load_model(judge.config)
        self.longest = _longest_input(self.model, self.tokenizer) - wire.new_tokens

    def prompt_ids(self, messages: Sequence[Message], prefill: str = "", tools: str = "") -> list[int]:
        """Ids of a framed text, as generation asks for them."""
        text = messages[-1].content + prefill
        return list(self.tokenizer(text, add_special_tokens=self.wire.add_special_tokens)["input_ids"])

    def opinions(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        clipped = [_clipped(self.tokenizer, answer, self.answer_tokens) for answer in answers]
        asked, framed = [], []
        found = [Opinion("unparsed", f"prompt and answer are longer than the {self.longest} tokens it reads")] * len(
            answers
        )
        for i, (prompt, answer) in enumerate(zip(prompts, clipped, strict=True)):
            if prompt.kind not in self.wire.judges:
                found[i] = Opinion("unparsed", f"made for attacks alone, and this is an {prompt.kind} prompt")
                continue
            text = Prompt(prompt.kind, self.wire.frame(prompt, answer))
            if len(self.prompt_ids(text.conversation())) <= self.longest:
                asked.append(i)
                framed.append(text)
        replies = generate_answers(
            self.model, self, framed, max_new_tokens=self.wire.new_tokens, batch_size=self.batch_size
        )
        for i, reply in zip(asked, replies, strict=True):
            found[i] = self.wire.read(prompts[i], answers[i], reply)
        return found


class _Sequence:
    """A classification head: its most probable label, mapped by the settings."""

    def __init__(self, judge: ClassifierJudge) -> None:
        self.reads = judge.reads
        self.batch_size = judge.batch_size
        self.tokenizer = load_tokenizer(judge.config)
        self.model = load_sequence_classifier(judge.config)
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.longest = _longest_input(self.model, self.tokenizer)
        # So that of a pair some of the prompt, which gives way, is always left.
        self.answer_tokens = min(judge.answer_tokens, 3 * self.longest // 4)
        own = [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]
        self.verdicts = _map_labels(judge, own)
        self.own = own

    def opinions(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        clipped = [_clipped(self.tokenizer, answer, self.answer_tokens) for answer in answers]
        texts = [p.text for p in prompts] if self.reads == "pair" else None

        def work(part: slice) -> list[list[float]]:
            return self._scores((texts[part], clipped[part]) if texts else (clipped[part],))

        chunks = Chunks(self.batch_size, self.model.device, "a judge's reading", "set quantization=nf4")
        found = [self._opinion(row) for rows in chunks.over(len(answers), work) for row in rows]
        self.batch_size = chunks.size
        return found

    @torch.inference_mode()
    def _scores(self, batch: tuple[list[str], ...]) -> list[list[float]]:
        # The prompt gives way where both are too long: the verdict is about the answer.
        cut = "only_first"
        tokenize = cast(Batching, self.tokenizer)
        inputs = tokenize(*batch, padding=True, truncation=cut, max_length=self.longest, return_tensors="pt")
        return self.model(**inputs.to(self.model.device)).logits.float().softmax(-1).tolist()

    def _opinion(self, scores: list[float]) -> Opinion:
        # Comparisons with NaN are false, so a model that gives none of the numbers has no best label.
        if not abs(sum(scores) - 1) < 1e-3:
            return Opinion("unparsed", "scores that are no numbers")
        best = max(range(len(scores)), key=scores.__getitem__)
        said = f"{self.own[best]} ({scores[best]:.3f})"
        label = self.verdicts.get(self.own[best])
        return Opinion(label, said) if label else Opinion("unparsed", f"{said}, a label without a verdict")


def _read_labels(pairs: Sequence[str]) -> dict[str, Judged]:
    found: dict[str, Judged] = {}
    for pair in pairs:
        own, colon, verdict = pair.rpartition(":")
        if not colon or verdict not in JUDGED:
            raise UserError(f"judge classifier: labels={pair!r} is no LABEL:VERDICT; verdicts: {', '.join(JUDGED)}")
        found[own] = verdict
    return found


def _map_labels(judge: ClassifierJudge, own: list[str]) -> dict[str, Judged]:
    """The verdict behind each of the model's ``own`` labels, by the settings, or by their very names."""
    mapping = judge.labels or {name: label for name in own for label in JUDGED if name.lower() == label}
    unknown = sorted(set(mapping) - set(own))
    if unknown or not mapping:
        problem = f"has no label {', '.join(unknown)}" if unknown else "has labels of its own"
        example = ",".join(f"{name}:{verdict}" for name, verdict in zip(own, ("refuse", "comply")))
        raise UserError(f"judge {judge.name}: it {problem} ({', '.join(own)}); map them, as in labels={example}")
    return mapping


def _clipped(tokenizer: Tokenizer, answer: str, tokens: int) -> str:
    """The answer's first tokens as text; the answer itself, to the letter, where it has no more."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return answer if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens], skip_special_tokens=True))


def _longest_input(model: CausalLM | SequenceClassifier, tokenizer: Tokenizer) -> int:
    """Tokens that the model reads at most, by its configuration and its tokenizer."""
    shape = model.config.get_text_config()
    limits = [getattr(shape, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    # RoBERTa's positions begin behind its padding's.
    offset = (
        (shape.pad_token_id or 0) + 1
        if getattr(shape, "model_type", "") in ("roberta", "xlm-roberta", "camembert")
        else 0
    )
    known = [limit - (offset if i == 0 else 0) for i, limit in enumerate(limits) if limit and limit < NO_LIMIT]
    return min(known, default=NO_LIMIT)
