"""Any model behind an OpenAI-compatible chat endpoint as a judge, by a rubric."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import ClassVar

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError, one_line
from repbend_fast.evaluation.judges.chat_client import ChatClient, NoReply
from repbend_fast.evaluation.judges.protocol import Opinion
from repbend_fast.evaluation.judges.rubric import fill, read_reply, read_rubric
from repbend_fast.evaluation.judges.wire_formats import empty
from repbend_fast.nearby import own_path

PATIENCE = 3
"""Questions in a row that got no reply, tries used up, after which the rest of a call is not asked."""


class EndpointJudge:
    """Asks for one verdict per answer, several at a time. What gets no reply is ``unparsed``, and is asked again by a
    later run; every reply is kept as it comes, so that an interrupted run goes on where it stopped.

    Args:
        url: of the API, as in ``http://127.0.0.1:8000/v1``.
        model: as the endpoint names it.
        api_key_env: environment variable that holds the key; none for an endpoint without one.
        rubric: a file of your own, with ``{prompt}``, ``{answer}`` and a line ``VERDICT:`` to ask for.
        cache: JSONL file of replies; none keeps them for this process alone.
        concurrency: questions under way at once.
        timeout: seconds for one try.
        tries: how often one question is asked, with a growing pause, before it is given up.
        temperature, max_tokens: as the endpoint takes them; none leaves them out.
    """

    asks_again: ClassVar[bool] = True
    """Whether what it left unparsed is worth asking about again: it may have been out of reach."""

    def __init__(
        self,
        *,
        url: str = "",
        model: str = "",
        api_key_env: str | None = None,
        rubric: str | None = None,
        cache: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        tries: int = 6,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
    ) -> None:
        for name, value in (("url", url), ("model", model)):
            if not value:
                raise UserError(
                    f"judge endpoint: it needs a {name}, as in endpoint:url=http://127.0.0.1:8000/v1,model=NAME"
                )
        if concurrency < 1 or tries < 1 or not timeout > 0:
            raise UserError("judge endpoint: concurrency and tries have to be 1 or more, and timeout above 0")
        self.concurrency = concurrency
        self.rubric = read_rubric(rubric)
        own = f" rubric {hashlib.sha256(self.rubric.encode()).hexdigest()[:8]}" if rubric else ""
        self.name = f"endpoint:{model}{own}"
        body = {"temperature": temperature, "max_tokens": max_tokens}
        self._stop = threading.Event()
        self.client = ChatClient(
            url,
            model,
            key_variable=api_key_env,
            timeout=timeout,
            tries=tries,
            body={name: value for name, value in body.items() if value is not None},
        )
        # A pause that ends when the call is over: nobody waits two minutes for an interrupted run to end.
        self.client.wait = self._stop.wait
        self._replies = Replies(own_path(cache) if cache else None)

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        """One opinion for each answer, in order. Empty answers are ``degenerate`` and not asked about.

        Raises:
            UserError: the endpoint refuses the settings; the replies so far are kept.
        """
        found = [empty(answer) for _, answer in zip(prompts, answers, strict=True)]
        texts = {i: fill(self.rubric, prompts[i], answers[i]) for i, opinion in enumerate(found) if opinion is None}
        problems = self._ask_all(
            [text for text in dict.fromkeys(texts.values()) if self._key(text) not in self._replies]
        )
        for i, text in texts.items():
            reply = self._replies.get(self._key(text))
            found[i] = Opinion("unparsed", problems[text]) if reply is None else read_reply(prompts[i], reply)
        return [opinion or Opinion("unparsed") for opinion in found]

    def _ask_all(self, texts: Sequence[str]) -> dict[str, str]:
        """Ask and keep the replies; returns why there is none, for the texts without."""
        problems: dict[str, str] = {}
        patience = Patience()
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            waiting = {pool.submit(self._ask, text, patience): text for text in texts}
            for future in as_completed(waiting):
                try:
                    future.result()
                except NoReply as error:
                    problems[waiting[future]] = str(error)
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return problems

    def _ask(self, text: str, patience: Patience) -> None:
        if self._stop.is_set() or patience.ended:
            raise NoReply(f"not asked, {PATIENCE} others in a row got no reply" if patience.ended else "not asked")
        try:
            reply = self.client.ask(text)
        except NoReply as error:
            patience.count(replied=error.lasting)
            raise
        patience.count(replied=True)
        self._replies.keep(self._key(text), reply)

    def _key(self, text: str) -> str:
        """Identifies a question: address, model and settings, and the whole text with the rubric."""
        parts = [str(self.client.url), self.client.body, text]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Patience:
    """Counts questions in a row without a reply. Who asks counts, before asking anything else."""

    def __init__(self) -> None:
        self.ended = False
        self._failures = 0
        self._lock = threading.Lock()

    def count(self, *, replied: bool) -> None:
        """One more question is done. Once patience has ended it stays so."""
        with self._lock:
            self._failures = 0 if replied else self._failures + 1
            self.ended = self.ended or self._failures >= PATIENCE


class Replies:
    """Replies by question, in a JSONL file as they come, or in memory where there is no ``path``."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        if path is not None:
            self._read(path)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> str | None:
        """The reply to a question, None where there is none yet."""
        return self._known.get(key)

    def keep(self, key: str, reply: str) -> None:
        """Take a reply in; it is in the file when this returns."""
        with self._lock:
            self._known[key] = reply
            if self.path is not None:
                # A surrogate from a broken reply is written as its escape.
                line = json.dumps({"key": key, "reply": reply}) + "\n"
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)

    def _read(self, path: Path) -> None:
        """What an earlier run kept. A last line that a kill has cut is taken out, and its question asked again."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with path.open("r+b") as file:
                    file.truncate(len(whole))
        except OSError as error:
            raise UserError(f"cache={path}: cannot be used ({one_line(error)}); name another file") from error
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._known[row["key"]] = str(row["reply"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: no reply of a judge ({one_line(error)}); name another file"
                ) from error
