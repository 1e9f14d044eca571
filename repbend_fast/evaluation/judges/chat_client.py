"""One question to an OpenAI-compatible chat endpoint: tried again while that can help, and its failures told apart."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx2

from repbend_fast.errors import UserError, one_line

FIRST_WAIT = 1.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST_WAIT = 120.0
"""Seconds. An endpoint that asks for more is not waited for."""
THIS_PROMPT_ALONE = {"content_filter", "content_policy_violation", "context_length_exceeded"}
"""Error codes of a 4xx that say something about one prompt and nothing about the settings."""


class NoReply(Exception):
    """The endpoint gave no reply to this question. ``lasting``: nothing but another question would change that."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class ChatClient:
    """Asks ``model`` behind ``url``; safe to use from several threads.

    ``wait`` sleeps, and says True where nobody waits for replies any more; ``clock`` is the time in seconds since the
    epoch. The key goes into a header and nowhere else: it is struck out of whatever the endpoint sends back.
    """

    def __init__(
        self, url: str, model: str, *, key_variable: str | None, timeout: float, tries: int, body: dict[str, object]
    ) -> None:
        self.url = _chat_url(url)
        self.where = f"endpoint {self.url.host}"
        self.tries = tries
        self.body = {"model": model, **body}
        self.wait: Callable[[float], object] = time.sleep
        self.clock: Callable[[], float] = time.time
        self.jitter: Callable[[], float] = random.random
        self._key = _read_key(key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A proxy of the environment's cannot reach this machine's own loopback.
        self._client = httpx2.Client(timeout=timeout, headers=headers, trust_env=self.url.host not in LOOPBACK)

    def ask(self, text: str) -> str:
        """The reply to one user message.

        Raises:
            NoReply: none came, with every try used up or with a refusal of this text alone.
            UserError: the endpoint refuses the settings (any other 4xx, or a redirection).
        """
        # Half a surrogate pair, which JSON data can hold, has no UTF-8.
        content = text.encode("utf-8", "replace").decode("utf-8")
        body = {**self.body, "messages": [{"role": "user", "content": content}]}
        reason = ""
        for done in range(self.tries):
            asked_for = None
            try:
                response = self._client.post(self.url, json=body)
            except httpx2.TimeoutException:
                reason = "no reply in time"
            except httpx2.RequestError as error:
                reason = self._safe(one_line(error))
            else:
                if response.status_code == 200:
                    reply = _content(response)
                    if reply is not None:
                        return self._safe(reply, cut=False)
                    reason = f"not a chat completion: {self._said(response)}"
                elif response.status_code in (408, 429) or response.status_code >= 500:
                    reason = f"status {response.status_code}: {self._said(response)}"
                    asked_for = self._retry_after(response)
                else:
                    self._refuse(response)
            if done + 1 < self.tries:
                self._pause(done, asked_for, reason)
        raise NoReply(f"{reason}, {self.tries} {'try' if self.tries == 1 else 'tries'}")

    def _pause(self, done: int, asked_for: float | None, reason: str) -> None:
        """Wait twice as long after each try, less up to half of it by chance, and no shorter than the endpoint asks."""
        if asked_for is not None and asked_for > LONGEST_WAIT:
            raise NoReply(f"{reason}, and it asks to wait for {asked_for:.0f} s")
        seconds = min(LONGEST_WAIT, FIRST_WAIT * 2**done) * (1 - self.jitter() / 2)
        if self.wait(max(seconds, asked_for or 0.0)):
            raise NoReply(f"{reason}, interrupted")

    def _retry_after(self, response: httpx2.Response) -> float | None:
        """Seconds that the endpoint asks to wait: a number, or the date of the end."""
        value = response.headers.get("Retry-After", "").strip()
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            until: datetime = parsedate_to_datetime(value)
        except ValueError:
            return None
        return max(0.0, until.timestamp() - self.clock())

    def _refuse(self, response: httpx2.Response) -> None:
        status, said = response.status_code, self._said(response)
        if status == 413 or _error_code(response) in THIS_PROMPT_ALONE:
            raise NoReply(f"status {status}: {said}", lasting=True)
        remedy = {
            401: "give the right key through api_key_env=VARIABLE",
            403: "give a key with the right to use this model through api_key_env=VARIABLE",
            404: "check url and model",
        }.get(status, "check url and model; temperature=none and max_tokens=none leave these out of the request")
        raise UserError(f"{self.where}: status {status}: {said}; {remedy}")

    def _said(self, response: httpx2.Response) -> str:
        try:
            content = response.json()
            error = content.get("error", content) if isinstance(content, dict) else content
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except ValueError:
            text = response.text
        return self._safe(text or response.reason_phrase)

    def _safe(self, text: str, cut: bool = True) -> str:
        """``text`` without the key; as an error on one line unless ``cut`` is False."""
        text = text.replace(self._key, "***") if self._key else text
        return one_line(ValueError(text)) if cut else text


def _chat_url(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise UserError(
            f"url={url!r} is none ({one_line(error)}); give one such as http://127.0.0.1:8000/v1"
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"url={url!r} is no http address; give one such as http://127.0.0.1:8000/v1")
    path = parsed.path.rstrip("/")
    return parsed if path.endswith("/chat/completions") else parsed.copy_with(path=f"{path}/chat/completions")


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"api_key_env={variable}: the environment has no such variable; export {variable}=…")
    if not key.isascii() or any(c.isspace() for c in key):
        raise UserError(f"api_key_env={variable}: its value is no key, it has spaces or other than ASCII letters")
    return key


def _content(response: httpx2.Response) -> str | None:
    """The reply's text; empty where the model said nothing, None where this is no chat completion."""
    try:
        message = response.json()["choices"][0]["message"]
        content = message["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return "" if content is None else content if isinstance(content, str) else None


def _error_code(response: httpx2.Response) -> str | None:
    try:
        return response.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
