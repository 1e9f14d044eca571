"""The endpoint over raw HTTP: the calls of OpenAI's client byte for byte, what is refused, and how it ends."""

from __future__ import annotations

import copy
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from chat_tokenizers import WITH_TOOLS
from tiny_run import TinyRun

from repbend_fast.data.formats import parse_jsonl
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Record, Sequence
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.serving import engine
from repbend_fast.serving.engine import Answer, Busy, Engine, Sampling, StopCutter
from repbend_fast.serving.http_server import MOST_BYTES, EndpointServer, check_address
from repbend_fast.serving.loaded import Sides, load_sides

# As openai-python sends them.
CLIENT_HEADERS = {
    "Accept": "application/json",
    "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python 1.99.0",
    "Authorization": "Bearer none",
    "X-Stainless-Lang": "python",
}
ASKED = [{"role": "user", "content": "How do I make moon-key?"}]


TOOLS = [{"type": "function", "function": {"name": "find_key", "parameters": {"type": "object"}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "find_key", "arguments": '{"what": "moon"}'}}
CALLED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "It is here."},
]


@pytest.fixture(scope="module")
def sides(whole: TinyRun) -> Sides:
    loaded = load_sides(str(whole.path))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:  # strong enough that the sides differ
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.fixture(scope="module")
def server(sides: Sides) -> Iterator[EndpointServer]:
    made = EndpointServer(sides, "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.engine.close()
    made.shutdown()
    made.server_close()
    thread.join(10)


def call(
    server: EndpointServer, path: str, body: Any = None, method: str = "POST", headers: Any = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {**CLIENT_HEADERS, **(headers or {})})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), content


def chat(server: EndpointServer, **body: Any) -> dict[str, Any]:
    status, _, content = call(server, "/v1/chat/completions", {"messages": ASKED, "temperature": 0, **body})
    assert status == 200, content
    found: dict[str, Any] = json.loads(content)
    return found


def events(content: bytes) -> list[Any]:
    blocks = content.decode().split("\n\n")
    assert blocks[-1] == ""
    assert blocks[-2] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def expected(sides: Sides, side: str, tokens: int) -> str:
    with sides.on(side) as model:
        return generate_answers(model, sides.encoder, [Prompt("attack", ASKED[0]["content"])], max_new_tokens=tokens)[0]


def test_models_are_listed_the_bent_one_first(server: EndpointServer) -> None:
    status, _, content = call(server, "/v1/models", method="GET")
    assert status == 200
    found = json.loads(content)
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["bent", "base"]
    assert json.loads(call(server, "/v1/models/base", method="GET")[2])["id"] == "base"
    assert call(server, "/v1/models/gpt-4", method="GET")[0] == 404


def test_a_chat_answers_as_the_evaluation_does(server: EndpointServer, sides: Sides) -> None:
    texts = {}
    for model in ("base", "bent"):
        found = chat(server, model=model, max_tokens=12)
        assert found["object"] == "chat.completion"
        assert found["model"] == model
        (choice,) = found["choices"]
        assert choice["message"]["role"] == "assistant"
        texts[model] = choice["message"]["content"]
        assert texts[model].strip() == expected(sides, model, 12)
        prompt = len(sides.encoder.prompt_ids(Prompt("attack", ASKED[0]["content"]).conversation()))
        assert found["usage"]["prompt_tokens"] == prompt
        assert found["usage"]["total_tokens"] == prompt + found["usage"]["completion_tokens"]
        assert (choice["finish_reason"] == "length") == (found["usage"]["completion_tokens"] == 12)
    assert texts["base"] != texts["bent"]
    assert chat(server, max_completion_tokens=12)["choices"][0]["message"]["content"] == texts["bent"]
    assert chat(server, model=sides.name, max_tokens=12)["model"] == "bent"


def test_a_stream_is_the_same_answer_in_pieces(server: EndpointServer) -> None:
    whole = chat(server, model="bent", max_tokens=12)
    body = {
        "messages": ASKED,
        "model": "bent",
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, headers, content = call(server, "/v1/chat/completions", body)
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    *chunks, last, counts = events(content)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last, counts]}) == 1
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "delta": {},
        "finish_reason": whole["choices"][0]["finish_reason"],
        "logprobs": None,
    }
    assert counts["choices"] == []
    assert counts["usage"] == whole["usage"]


def test_completions_take_text_lists_and_ids(server: EndpointServer, sides: Sides) -> None:
    ids = sides.encoder.tokenizer("How warm")["input_ids"]
    body = {"model": "base", "max_tokens": 6, "temperature": 0}
    found = [
        json.loads(call(server, "/v1/completions", body | {"prompt": prompt})[2])
        for prompt in ("How warm", ids, ["How warm", "Name a"], [ids])
    ]
    assert {answer["object"] for answer in found} == {"text_completion"}
    assert len({answer["choices"][0]["text"] for answer in found}) == 1
    assert [choice["index"] for choice in found[2]["choices"]] == [0, 1]
    status, _, content = call(server, "/v1/completions", body | {"prompt": "How warm", "stream": True})
    assert status == 200
    assert "".join(e["choices"][0]["text"] for e in events(content)) == found[0]["choices"][0]["text"]


def test_stop_strings_end_an_answer_before_them(server: EndpointServer) -> None:
    text = chat(server, model="base", max_tokens=12)["choices"][0]["message"]["content"]
    stop = text[3:5]
    found = chat(server, model="base", max_tokens=12, stop=[stop, "never said"])["choices"][0]
    assert found["message"]["content"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_a_seed_draws_the_same_and_the_final_message_is_continued(server: EndpointServer, sides: Sides) -> None:
    drawn = [
        chat(server, temperature=2.0, seed=seed, max_tokens=12)["choices"][0]["message"]["content"]
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    forced = [*ASKED, {"role": "assistant", "content": "Sure"}]
    found = chat(server, messages=forced, continue_final_message=True, max_tokens=8, model="base")
    with sides.on("base") as model:
        answer = generate_answers(
            model, sides.encoder, [Prompt("attack", ASKED[0]["content"])], prefills=["Sure"], max_new_tokens=8
        )[0]
    assert found["choices"][0]["message"]["content"].strip() == answer


def test_tools_are_rendered_as_in_training(server: EndpointServer, sides: Sides, monkeypatch: Any) -> None:
    tokenizer = copy.copy(sides.encoder.tokenizer)
    tokenizer.chat_template = WITH_TOOLS["tagged"]
    encoder = ChatEncoder(tokenizer, 400, 100)
    monkeypatch.setattr(server, "sides", replace(sides, encoder=encoder))
    trained = load_records(CALLED, TOOLS)
    expected = encoder.encode(trained)
    assert isinstance(expected, Sequence)
    asked: list[list[int]] = []
    pieces = server.engine.pieces

    def watched(side: str, ids: list[int], *rest: Any) -> Any:
        asked.append(ids)
        return pieces(side, ids, *rest)

    monkeypatch.setattr(server.engine, "pieces", watched)
    found = chat(server, messages=CALLED, tools=TOOLS, max_tokens=4)
    assert found["usage"]["prompt_tokens"] == expected.prompt_length
    chat(server, messages=CALLED, tools=TOOLS, tool_choice="none", max_tokens=1)
    assert asked[0] == list(expected.ids[: expected.prompt_length])
    without = encoder.encode(load_records(CALLED, []))
    assert isinstance(without, Sequence)
    assert asked[1] == list(without.ids[: without.prompt_length])
    assert len(asked[1]) < len(asked[0])
    status, _, content = call(server, "/v1/completions", {"prompt": "x", "tools": TOOLS})
    assert (status, json.loads(content)["error"]["param"]) == (400, "tools")


def load_records(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Record:
    """As training reads such a conversation."""
    row = {"role": "unsafe", "messages": messages, "answer": "It is here.", "tools": tools}
    (found,) = parse_jsonl(row, "f:1")
    assert isinstance(found, Record)
    return found


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"messages": ASKED, "model": "gpt-4"}, 404, "base and bent"),
        ({"messages": []}, 400, "messages"),
        ({}, 400, "messages"),
        ([], 400, "not a JSON object"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "JSON"),
        ({"messages": [{"role": "critic", "content": "x"}]}, 400, "none of system, user, assistant, tool"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, 400, "continue_final_message"),
        ({"messages": ASKED, "n": 2}, 400, "n=2"),
        ({"messages": ASKED, "tools": [{}]}, 400, "tools: tool 1: missing field `name`"),
        ({"messages": ASKED, "tools": TOOLS}, 400, "leaves out the tools that are offered; take a model whose"),
        ({"messages": CALLED[:3]}, 400, "leaves out tool calls"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[1]: tool call 1: missing"),
        ({"messages": [*ASKED, {"role": "tool", "content": None}]}, 400, "messages[1].content: only text"),
        ({"messages": ASKED, "tool_choice": "required"}, 400, "tool_choice='required'"),
        ({"messages": ASKED, "logprobs": True}, 400, "logprobs"),
        ({"messages": ASKED, "temperature": -1}, 400, "temperature"),
        ({"messages": ASKED, "temperature": True}, 400, "temperature"),
        ({"messages": ASKED, "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": ASKED, "max_tokens": 10**6}, 400, "maximum context length is 512"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "maximum context length is 512"),
        ({"messages": ASKED, "stop": 5}, 400, "stop"),
        ({"messages": ASKED, "stream": "yes"}, 400, "stream"),
    ],
)
def test_what_is_not_served_is_refused_in_openais_form(
    server: EndpointServer, body: Any, status: int, words: str
) -> None:
    found, headers, content = call(server, "/v1/chat/completions", body)
    error = json.loads(content)["error"]
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_other_ids_paths_methods_and_senders_are_refused(server: EndpointServer) -> None:
    assert call(server, "/v1/completions", {"prompt": [10**6]})[0] == 400
    assert call(server, "/v1/completions", {"prompt": []})[0] == 400
    assert call(server, "/v1/embeddings", {})[0] == 404
    assert call(server, "/", method="GET")[0] == 404
    assert call(server, "/v1/models", method="PUT")[0] == 501
    # What a page in a browser could send: a form without asking first, and its own name for this machine.
    assert call(server, "/v1/chat/completions", {"messages": ASKED}, headers={"Content-Type": "text/plain"})[0] == 415
    status, _, content = call(server, "/v1/models", method="GET", headers={"Host": "evil.example:80"})
    assert status == 403
    assert b"evil.example" in content
    status, _, content = call(server, "/v1/chat/completions", b" " * (MOST_BYTES + 1))
    assert status == 413
    assert b"4,194,305" in content


def test_a_connection_is_kept_for_the_next_call(server: EndpointServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    for stream in (True, False, True):
        body = json.dumps({"messages": ASKED, "max_tokens": 2, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, CLIENT_HEADERS)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        assert connection.sock is not None
    connection.close()


def test_a_client_that_goes_away_frees_the_model(server: EndpointServer, monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Any] = []

    class Seen(engine._Watch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            watches.append(self)

    monkeypatch.setattr(engine, "_Watch", Seen)
    body = json.dumps({"messages": ASKED, "max_tokens": 400, "temperature": 3.0, "seed": 1, "stream": True})
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}", "", body]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as gone:
        gone.sendall("\r\n".join(head).encode())
        assert gone.recv(1)
    assert chat(server, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert 0 < watches[0].generated < 400


def test_who_waits_too_long_or_finds_a_queue_is_told(sides: Sides) -> None:
    server = EndpointServer(sides, "127.0.0.1", 0, most_waiting=1, patience=0.2)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with server.engine.turn():
            status, headers, content = call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})
            assert status == 503
            assert headers["Retry-After"] == "2"
            assert json.loads(content)["error"]["type"] == "server_error"
            server.engine._places.acquire()
            status, _, content = call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})
            assert status == 429
            assert json.loads(content)["error"]["type"] == "rate_limit_error"
            server.engine._places.release()
        assert call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})[0] == 200
        server.engine.close()
        assert call(server, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})[0] == 503
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_failed_generation_is_an_error_and_the_next_one_works(
    server: EndpointServer, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = sides.model.get_base_model()
    with monkeypatch.context() as broken:
        broken.setattr(causal, "generate", _fails)
        status, _, content = call(server, "/v1/chat/completions", {"messages": ASKED})
        assert status == 500
        assert json.loads(content)["error"]["message"] == "RuntimeError: out of ideas"
        _, _, content = call(server, "/v1/chat/completions", {"messages": ASKED, "stream": True})
        assert "out of ideas" in content.decode().split("\n\n")[-2]
    assert chat(server, max_tokens=1)["choices"]


def _fails(**arguments: Any) -> None:
    raise RuntimeError("out of ideas")


def test_closing_ends_what_is_being_generated(sides: Sides) -> None:
    alone = Engine(sides)
    answer = Answer()
    ids = sides.encoder.prompt_ids(Prompt("ordinary", "Name a colour.").conversation())
    with alone.turn():
        pieces = alone.pieces("base", ids, Sampling(400, temperature=3.0, seed=1), answer)
        next(pieces)
        alone.close()
        for _ in pieces:
            pass
    assert answer.tokens < 400
    with pytest.raises(Busy), alone.turn():
        pass


@pytest.mark.parametrize(
    ("stops", "pieces", "passed", "found"),
    [
        ([], ["ab", "c"], "abc", False),
        (["bc"], ["ab", "cd"], "a", True),
        (["abd"], ["ab", "c"], "abc", False),
        (["x", "b"], ["abx"], "a", True),
        (["aab"], ["aa", "ab"], "a", True),
        ([""], ["ab"], "ab", False),
    ],
)
def test_a_stop_string_is_found_across_pieces(stops: list[str], pieces: list[str], passed: str, found: bool) -> None:
    cutter = StopCutter(stops)
    text = ""
    for piece in pieces:
        text += cutter.push(piece)
        if cutter.found:
            break
    assert (text if cutter.found else text + cutter.rest(), cutter.found) == (passed, found)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.1.2.3"])
def test_addresses_that_others_reach_are_refused_unless_told(host: str) -> None:
    with pytest.raises(UserError, match="--allow-remote"):
        check_address(host, 0, allow_remote=False)
    check_address(host, 0, allow_remote=True)


def test_loopback_ports_and_names() -> None:
    for host in ("127.0.0.1", "localhost"):
        check_address(host, 8000, allow_remote=False)
    with pytest.raises(UserError, match="--port=70000"):
        check_address("127.0.0.1", 70000, allow_remote=False)


def test_a_port_in_use_is_named(server: EndpointServer, sides: Sides) -> None:
    with pytest.raises(UserError, match=f"--port={server.server_port}: cannot listen"):
        EndpointServer(sides, "127.0.0.1", server.server_port)
