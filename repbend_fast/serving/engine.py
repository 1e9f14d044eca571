"""Generation for the endpoint: one answer at a time, in pieces, cut at stop strings, given up when nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.evaluation.generate import end_tokens
from repbend_fast.models.decoder import causal_model
from repbend_fast.models.layers.switches import generation_settings
from repbend_fast.serving.loaded import Sides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_WAITING = 32
PATIENCE = 600.0
"""Seconds that a request waits for those before it."""


class Busy(Exception):
    """Too many wait, or one has waited for too long. ``status``: the answer over HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: greedily at temperature 0. ``seed``: None = not set."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass
class Answer:
    """What came of one prompt. ``reason`` is OpenAI's ``finish_reason``: "stop" or "length"."""

    text: str = ""
    tokens: int = 0
    reason: str = "length"


class Engine:
    """The model behind the endpoint. Requests take turns: base and bent are one model with a switch."""

    def __init__(self, sides: Sides, *, most_waiting: int = MOST_WAITING, patience: float = PATIENCE) -> None:
        self.sides = sides
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(most_waiting + 1)
        self._patience = patience
        self._closed = threading.Event()

    def close(self) -> None:
        """Give up what is being generated, and take nothing more."""
        self._closed.set()

    def wait(self, seconds: float) -> None:
        """Until nothing is generated any more, or so many seconds: a process must not end under a running kernel."""
        if self._turn.acquire(timeout=seconds):
            self._turn.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the model.

        Raises:
            Busy: 429 where too many wait already, 503 after ``patience`` seconds or when the server ends.
        """
        if not self._places.acquire(blocking=False):
            raise Busy(429, "too many requests wait for the model, which answers one at a time; try again later")
        try:
            if not self._turn.acquire(timeout=self._patience):
                raise Busy(503, f"the model was busy for {self._patience:.0f} seconds; try again later")
            try:
                if self._closed.is_set():
                    raise Busy(503, "the server is ending")
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def pieces(self, side: str, ids: Sequence[int], sampling: Sampling, answer: Answer) -> Generator[str, None, None]:
        """The text as it comes, inside of :meth:`turn`; ``answer`` has the whole at the end. Closing the iterator ends
        the generation at its next token.

        Raises:
            Exception: what the generation raised, an out-of-memory for one.
        """
        streamer = TextIteratorStreamer(
            cast("PreTrainedTokenizerBase", self.sides.encoder.tokenizer), skip_prompt=True, skip_special_tokens=True
        )
        watch = _Watch(self._closed, len(ids))
        failure: list[BaseException] = []
        arguments = (side, ids, sampling, streamer, watch, failure)
        worker = threading.Thread(target=self._generate, args=arguments, name="generation", daemon=True)
        worker.start()
        cutter = StopCutter(sampling.stop)
        try:
            for text in streamer:
                piece = cutter.push(text)
                answer.text += piece
                if piece:
                    yield piece
                if cutter.found:
                    break
            if not cutter.found and (rest := cutter.rest()):
                answer.text += rest
                yield rest
        finally:
            watch.given_up.set()
            worker.join()
            answer.tokens = watch.generated
            answer.reason = "stop" if cutter.found or watch.ended else "length"
        if failure:
            raise failure[0]

    def _generate(
        self,
        side: str,
        ids: Sequence[int],
        sampling: Sampling,
        streamer: TextIteratorStreamer,
        watch: _Watch,
        failure: list[BaseException],
    ) -> None:
        causal = causal_model(self.sides.model)
        settings = _settings(causal.generation_config, self.sides.encoder.tokenizer, sampling)
        watch.ends = frozenset(settings.eos_token_id or ())
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            inputs = torch.tensor([list(ids)], device=self.sides.device)
            with self.sides.on(side), torch.inference_mode(), generation_settings(causal, settings):
                causal.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
        except BaseException as error:  # for the thread that waits
            failure.append(error)
            streamer.end()


class _Watch(StoppingCriteria):
    """Counts tokens, sees whether the answer ended by itself, and ends it when nobody wants the rest."""

    def __init__(self, closed: threading.Event, prompt: int) -> None:
        self.given_up = threading.Event()
        self.generated = 0
        self.ended = False
        self.ends: frozenset[int] = frozenset()
        self._closed, self._prompt = closed, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.generated = input_ids.shape[1] - self._prompt
        self.ended = int(input_ids[0, -1]) in self.ends
        done = self.given_up.is_set() or self._closed.is_set()
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)


def _settings(own: GenerationConfig, tokenizer: Tokenizer, sampling: Sampling) -> GenerationConfig:
    """In place of the model's own: ``generate`` would fill what is left open, a repetition penalty say, from those."""
    ends = end_tokens(own.eos_token_id, tokenizer)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        do_sample=bool(drawn),
        max_new_tokens=sampling.max_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        bos_token_id=own.bos_token_id,
        **drawn,
    )


class StopCutter:
    """Passes text on up to the first of the stop strings, and keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> str:
        """What is safe to pass on after ``text``."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def rest(self) -> str:
        """What was kept back, once no more comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
