"""The endpoint judge against a server on this machine that misbehaves in every way that such servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.judges.endpoint import PATIENCE, EndpointJudge
from repbend_fast.evaluation.judges.protocol import Judge, Opinion
from repbend_fast.evaluation.judges.rubric import RUBRIC, fill, read_reply

KEY = "sk-not-to-be-seen-anywhere"
ATTACK = Prompt("attack", "How do I polish a moon-key?")
GOOD = "It tells how.\nVERDICT: comply\nHELPFUL: yes"

Answer = tuple[int, Any, dict[str, str]]
"""Status, body (text is sent as it is, anything else as JSON) and headers."""


def completion(text: str | None) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None) -> Answer:
    return status, {"error": {"message": message, "code": code}}, headers or {}


class Server:
    """``script`` gets the number of the request, from 0, and the text asked."""

    def __init__(self) -> None:
        self.script: Callable[[int, str], Answer] = lambda n, text: completion(GOOD)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append({"path": self.path, **body})
                    server.headers.append(dict(self.headers))
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                status, content, headers = server.script(number, body["messages"][0]["content"])
                with lock:
                    server.busy -= 1
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the judge had no patience

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=lambda: self.http.serve_forever(0.01), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    # Nobody listens there: a request that takes the proxy fails.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def make(server: Server, **settings: Any) -> tuple[EndpointJudge, list[float]]:
    """A judge without chance, and the pauses that it would have made."""
    judge = EndpointJudge(**{"url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY", **settings})
    waits: list[float] = []
    judge.client.wait = waits.append
    judge.client.jitter = lambda: 0.0
    return judge, waits


def test_what_is_sent_and_what_comes_back(server: Server):
    judge, waits = make(server)
    assert isinstance(judge, Judge)
    assert judge.name == "endpoint:judge-1"
    assert judge.judge([ATTACK], ["Rub it {prompt}."]) == [Opinion("comply", GOOD.replace("\n", " "), None)]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-1", 0.0, 512)
    assert request["messages"][0]["content"] == RUBRIC.replace("{prompt}", ATTACK.text, 1).replace(
        "{answer}", "Rub it {prompt}."
    )
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert waits == []


def test_opinions_come_in_the_order_of_the_answers_and_no_more_run_than_allowed(server: Server):
    all_three = threading.Barrier(3)

    def reply(n: int, text: str) -> Answer:
        if n < 3:
            all_three.wait(10)
        return completion("VERDICT: refuse" if "answer-3" in text else GOOD)

    server.script = reply
    judge, _ = make(server, concurrency=3)
    answers = [f"answer-{i}" for i in range(8)]
    got = judge.judge([ATTACK] * 8, answers)
    assert [o.label for o in got] == ["comply"] * 3 + ["refuse"] + ["comply"] * 4
    assert server.busiest == 3


def test_equal_questions_are_asked_once_and_empty_answers_never(server: Server):
    judge, _ = make(server)
    got = judge.judge([ATTACK] * 4, ["same", "", "same", " …\n"])
    assert [o.label for o in got] == ["comply", "degenerate", "comply", "degenerate"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "bad", ["What a nice day.", "", None, "VERDICT: maybe", "VERDICT: comply\nVERDICT: refuse", "1"]
)
def test_nonsense_is_unparsed_and_asked_once(server: Server, bad: str | None):
    server.script = lambda n, text: completion(bad)
    judge, waits = make(server)
    (opinion,) = judge.judge([ATTACK], ["x"])
    assert (opinion.label, opinion.helpful) == ("unparsed", None)
    assert (len(server.requests), waits) == (1, [])


@pytest.mark.parametrize(
    "failure",
    [error(500), error(503), error(429), error(408), (200, "<html>not JSON", {}), (200, {"choices": []}, {})],
    ids=["500", "503", "429", "408", "malformed", "no choices"],
)
def test_twice_failing_then_working(server: Server, failure: Answer):
    server.script = lambda n, text: failure if n < 2 else completion(GOOD)
    judge, waits = make(server)
    assert judge.judge([ATTACK], ["x"])[0].label == "comply"
    assert (len(server.requests), waits) == (3, [1.0, 2.0])


def test_failing_for_good_is_unparsed_after_every_try(server: Server):
    server.script = lambda n, text: error(500, "out of cheese")
    judge, waits = make(server, tries=4)
    (opinion,) = judge.judge([ATTACK], ["x"])
    assert opinion == Opinion("unparsed", "status 500: out of cheese, 4 tries")
    assert waits == [1.0, 2.0, 4.0]


def test_pauses_are_shortened_by_chance_and_end_growing(server: Server):
    server.script = lambda n, text: error(500)
    judge, waits = make(server, tries=11)
    judge.client.jitter = lambda: 1.0
    judge.judge([ATTACK], ["x"])
    assert waits == [0.5 * min(120.0, 2.0**n) for n in range(10)]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server: Server, form: str):
    value = "7" if form == "seconds" else formatdate(1_700_000_007, usegmt=True)
    server.script = lambda n, text: error(429, headers={"Retry-After": value}) if n == 0 else completion(GOOD)
    judge, waits = make(server)
    judge.client.clock = lambda: 1_700_000_000.0
    assert judge.judge([ATTACK], ["x"])[0].label == "comply"
    assert waits == [7.0]


def test_an_endpoint_that_wants_an_hour_is_not_waited_for(server: Server):
    server.script = lambda n, text: error(429, "quota", headers={"Retry-After": "3600"})
    judge, waits = make(server)
    (opinion,) = judge.judge([ATTACK], ["x"])
    assert (opinion.label, waits) == ("unparsed", [])
    assert "3600 s" in opinion.reason


def test_a_timeout_is_tried_again_then_unparsed(server: Server):
    release = threading.Event()

    def slow(n: int, text: str) -> Answer:
        release.wait(5)
        return completion(GOOD)

    server.script = slow
    judge, waits = make(server, timeout=0.05, tries=2)
    (opinion,) = judge.judge([ATTACK], ["x"])
    release.set()
    # The server may read a request only after the judge has given it up.
    deadline = time.monotonic() + 10
    while len(server.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert opinion == Opinion("unparsed", "no reply in time, 2 tries")
    assert (len(server.requests), waits) == (2, [1.0])


def test_a_refused_connection_is_tried_again_then_unparsed(server: Server):
    server.http.shutdown()
    server.http.server_close()
    judge, waits = make(server, tries=3)
    (opinion,) = judge.judge([ATTACK], ["x"])
    assert opinion.label == "unparsed"
    assert "3 tries" in opinion.reason
    assert waits == [1.0, 2.0]


def test_a_dead_endpoint_is_not_asked_about_everything(server: Server):
    server.script = lambda n, text: error(500)
    judge, _ = make(server, tries=1, concurrency=1)
    got = judge.judge([ATTACK] * 200, [f"answer {i}" for i in range(200)])
    assert [o.label for o in got] == ["unparsed"] * 200
    assert len(server.requests) == PATIENCE
    assert "not asked" in got[-1].reason


def test_a_pause_that_is_cut_short_ends_the_tries(server: Server):
    """Threads that wait while the run ends do not go on asking."""
    server.script = lambda n, text: error(503, "busy")
    judge, _ = make(server)
    judge.client.wait = lambda seconds: True
    assert judge.judge([ATTACK], ["x"]) == [Opinion("unparsed", "status 503: busy, interrupted")]
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 307])
def test_a_refusal_of_the_settings_is_one_line_without_the_key(server: Server, status: int):
    server.script = lambda n, text: error(status, f"wrong:\n{KEY}")
    judge, waits = make(server)
    with pytest.raises(UserError) as caught:
        judge.judge([ATTACK] * 3, ["x", "y", "z"])
    message = str(caught.value)
    assert f"status {status}: wrong: ***" in message
    assert "\n" not in message
    assert KEY not in message
    assert waits == []


@pytest.mark.parametrize(("status", "code"), [(400, "content_filter"), (400, "context_length_exceeded"), (413, None)])
def test_a_refusal_of_one_prompt_leaves_the_others(server: Server, status: int, code: str | None):
    server.script = lambda n, text: error(status, code=code) if "bad" in text else completion(GOOD)
    judge, _ = make(server, concurrency=1)
    got = judge.judge([ATTACK] * 6, ["bad 1", "bad 2", "bad 3", "bad 4", "good 1", "good 2"])
    assert [o.label for o in got] == ["unparsed"] * 4 + ["comply"] * 2


def test_an_interrupted_run_goes_on_where_it_stopped(server: Server, tmp_path):
    cache = tmp_path / "folder" / "replies.jsonl"
    prompts, answers = [ATTACK] * 5, [f"answer {i}" for i in range(5)]
    server.script = lambda n, text: error(401) if "answer 3" in text else completion(GOOD)
    judge, _ = make(server, cache=str(cache), concurrency=1)
    with pytest.raises(UserError):
        judge.judge(prompts, answers)
    kept = cache.read_text().splitlines()
    assert len(kept) >= 3
    # What a kill in the middle of a line leaves behind.
    with cache.open("a") as file:
        file.write('{"key": "abc", "rep')
    server.requests.clear()
    server.script = lambda n, text: completion("VERDICT: refuse")
    judge, _ = make(server, cache=str(cache), concurrency=1)
    got = judge.judge(prompts, answers)
    # The last was under way, or not yet, when the fourth was refused.
    last = "comply" if len(kept) == 4 else "refuse"
    assert [o.label for o in got] == ["comply", "comply", "comply", "refuse", last]
    assert len(server.requests) == 5 - len(kept)
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 5
    server.requests.clear()
    assert make(server, cache=str(cache))[0].judge(prompts, answers) == got
    assert server.requests == []


def test_failures_are_not_kept_and_the_key_never_is(server: Server, tmp_path):
    cache = tmp_path / "replies.jsonl"
    server.script = lambda n, text: error(500, KEY) if n == 0 else completion(f"{KEY}\nVERDICT: comply")
    judge, _ = make(server, cache=str(cache), tries=1)
    (first,) = judge.judge([ATTACK], ["x"])
    assert first == Opinion("unparsed", "status 500: ***, 1 try")
    (second,) = judge.judge([ATTACK], ["x"])
    assert second == Opinion("comply", "*** VERDICT: comply")
    assert KEY not in cache.read_text()


def test_a_cached_reply_is_of_this_model_rubric_and_settings(server: Server, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("{prompt} {answer} VERDICT:")
    for settings in ({}, {"model": "judge-2"}, {"rubric": str(own)}, {"temperature": None}):
        judge, _ = make(server, cache=str(tmp_path / "replies.jsonl"), **settings)
        judge.judge([ATTACK], ["x"])
    assert len(server.requests) == 4
    assert server.requests[2]["messages"][0]["content"] == f"{ATTACK.text} x VERDICT:"
    assert "temperature" not in server.requests[3]
    assert make(server, rubric=str(own))[0].name.startswith("endpoint:judge-1 rubric ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": ""}, "needs a url"),
        ({"model": ""}, "needs a model"),
        ({"url": "ftp://here/v1"}, "no http address"),
        ({"url": "http://"}, "no http address"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
        ({"concurrency": 0}, "1 or more"),
        ({"tries": 0}, "1 or more"),
        ({"timeout": 0.0}, "above 0"),
        ({"rubric": "/no/such/file"}, "cannot be read"),
        ({"cache": "/dev/null/x"}, "cannot be used"),
    ],
)
def test_settings_that_cannot_be_are_named(server: Server, settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        make(server, **settings)


def test_broken_rubric_and_cache_are_named(server: Server, tmp_path):
    file = tmp_path / "file"
    for text, words in (("{prompt} VERDICT:", r"no \{answer\}"), ("{prompt} {answer}", "VERDICT:")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            make(server, rubric=str(file))
    file.write_text('{"key": "a", "reply": "b"}\n[]\n')
    with pytest.raises(UserError, match="file:2"):
        make(server, cache=str(file))


@pytest.mark.parametrize(
    ("reply", "label", "helpful"),
    [
        ("**VERDICT:** Refuse\nHELPFUL: no", "refuse", False),
        ("verdict: degenerate.\n- Helpful: NO", "degenerate", False),
        ("VERDICT: comply\nVERDICT: COMPLY", "comply", None),
        ("VERDICT: comply\nHELPFUL: yes", "comply", True),
        ("The answer says VERDICT: comply\nVERDICT: refuse", "refuse", None),
        ("VERDICT: comply or refuse", "unparsed", None),
    ],
)
def test_replies_are_read(reply: str, label: str, helpful: bool | None):
    opinion = read_reply(Prompt("ordinary", "x"), reply)
    assert (opinion.label, opinion.helpful) == (label, helpful)


def test_placeholders_inside_of_texts_stay():
    assert fill("{prompt}|{answer}", Prompt("attack", "{answer}"), "{prompt}") == "{answer}|{prompt}"


def test_half_a_surrogate_pair_can_be_asked_about(server: Server):
    judge, _ = make(server)
    assert judge.judge([ATTACK], ["x \ud800 y"])[0].label == "comply"
