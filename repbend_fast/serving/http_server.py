"""``serve``: an OpenAI-compatible endpoint on the standard library's HTTP server, on the loopback.

It has the two things that general servers lack: base and bent of one loaded model under two names, and prompts
rendered exactly as in training. For throughput, serve an exported model with vLLM or ``transformers serve``.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from repbend_fast.console import note, say
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.decoder import causal_model
from repbend_fast.serving.engine import MOST_WAITING, PATIENCE, Answer, Busy, Engine, Sampling
from repbend_fast.serving.loaded import Sides
from repbend_fast.serving.wire import (
    DEFAULT_TOKENS,
    Refused,
    Reply,
    Request,
    read_messages,
    read_prompts,
    read_request,
    read_tools,
)

MOST_BYTES = 4 << 20
"""Of a request's body."""
MOST_DISCARDED = 64 << 20
IDLE_SECONDS = 120.0
"""That a connection may be silent."""
ENDING_SECONDS = 10.0
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def check_address(host: str, port: int, allow_remote: bool) -> None:
    """Refuse an address that other machines reach, unless that is wanted.

    Raises:
        UserError: not a loopback address, unknown, or no port.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port}: give a number from 0 to 65535 (0: any free one)")
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host}: no address of this name ({one_line(error)})") from error
    if not allow_remote and not all(ipaddress.ip_address(str(a).split("%")[0]).is_loopback for a in found):
        raise UserError(
            f"--host={host}: other machines reach this address, and the endpoint asks nobody who they are; use "
            "127.0.0.1, or add --allow-remote"
        )


class EndpointServer(ThreadingHTTPServer):
    """Listens once it is made; ``serve_forever`` answers."""

    daemon_threads = True  # an open connection does not hold the end up

    def __init__(
        self,
        sides: Sides,
        host: str,
        port: int,
        *,
        allow_remote: bool = False,
        most_waiting: int = MOST_WAITING,
        patience: float = PATIENCE,
    ) -> None:
        check_address(host, port, allow_remote)
        self.sides = sides
        self.engine = Engine(sides, most_waiting=most_waiting, patience=patience)
        self.only_local = not allow_remote
        self.host_name = host.lower()
        # A fast tokenizer's encoding is not made for several threads.
        self.encoding = threading.Lock()
        # Prompts are never cut here: one that is too long is refused.
        sides.encoder.max_prompt_tokens = 1 << 40
        family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        try:
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(
                f"--port={port}: cannot listen on {host} ({one_line(error)}); choose another port"
            ) from error

    @property
    def url(self) -> str:
        """What clients take as ``base_url``."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else str(host)}:{port}/v1"

    def server_bind(self) -> None:
        """As the base class, without its look-up of the machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """A client that went away is no news; anything else is a defect, with its traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(sides: Sides, host: str, port: int, *, allow_remote: bool) -> None:
    """Answer until Ctrl-C."""
    server = EndpointServer(sides, host, port, allow_remote=allow_remote)
    say(f"serving {', '.join(sides.names)} of {sides.name} at {server.url} (model={sides.names[-1]}); Ctrl-C ends")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        note("ended")
    finally:
        server.engine.close()
        server.server_close()
        server.engine.wait(ENDING_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    server: EndpointServer
    protocol_version = "HTTP/1.1"
    server_version = "repbend-fast"
    sys_version = ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    _begun = False

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: prompts and addresses of clients are not ours to write down."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, act: Callable[[], None]) -> None:
        """Run ``act``; what goes wrong becomes an error of OpenAI's form, or the end of a stream that has begun."""
        self._begun = False
        try:
            self._check_client()
            act()
        except Refused as refused:
            self._fail(refused)
        except Busy as busy:
            kind = "rate_limit_error" if busy.status == 429 else "server_error"
            self._fail(Refused(busy.status, str(busy), kind=kind))
        except UserError as error:
            self._fail(Refused(400, str(error)))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            note(f"a request failed: {type(error).__name__}: {one_line(error)}")
            self._fail(Refused(500, f"{type(error).__name__}: {one_line(error)}"))

    def _check_client(self) -> None:
        """A page in a browser on this machine is a stranger too: it may neither resolve its own name to the loopback
        nor send forms there.
        """
        given = self.headers.get("Host")
        if given is None or not self.server.only_local:
            return
        try:
            host = urlsplit(f"//{given}").hostname
        except ValueError:
            host = None
        if host not in (*_LOCAL_NAMES, self.server.server_name, self.server.host_name):
            self._discard()
            raise Refused(403, f"Host {given!r:.80} is not this machine's loopback; --allow-remote lets it in")

    def _discard(self) -> None:
        """Read a body that is refused, within reason, so that the client comes to read why; then hang up."""
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        left = min(int(length), MOST_DISCARDED) if length.isdigit() else 0
        while left > 0 and (block := self.rfile.read(min(left, 1 << 16))):
            left -= len(block)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: no HTTP, or a method that is not served."""
        self.close_connection = True
        self._send(int(code), Refused(int(code), message or HTTPStatus(code).phrase).body())

    def _get(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        if path == "/v1/models":
            self._send(200, {"object": "list", "data": [_model(name) for name in reversed(self.server.sides.names)]})
        elif path.startswith("/v1/models/"):
            self._send(200, _model(self._side(path.removeprefix("/v1/models/"))))
        elif path == "/health":
            self._send(200, {"status": "ok"})
        else:
            self._no_such_path()

    def _post(self) -> None:
        body = self._body()
        path = self.path.split("?")[0].rstrip("/")
        if path == "/v1/chat/completions":
            self._complete(body, chat=True)
        elif path == "/v1/completions":
            self._complete(body, chat=False)
        else:
            self._no_such_path()

    def _no_such_path(self) -> None:
        raise Refused(
            404,
            f"{self.command} {self.path[:200]}: there are GET /v1/models, POST /v1/chat/completions and POST "
            "/v1/completions",
        )

    def _body(self) -> Mapping[str, object]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise Refused(411, "Content-Length is missing")
        if int(length) > MOST_BYTES:
            self._discard()
            raise Refused(413, f"the request has {int(length):,} bytes, more than {MOST_BYTES:,}")
        raw = self.rfile.read(int(length))
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise Refused(415, f"Content-Type is {kind:.80}; send application/json")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({one_line(error)})") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        return body

    def _side(self, model: str | None) -> str:
        """The side that a model's name means; the bent one, where there is one, for none and for the loaded name."""
        sides = self.server.sides
        if model in sides.names:
            return str(model)
        if model in (None, "", sides.name):
            return sides.names[-1]
        names = " and ".join(sides.names)
        raise Refused(
            404, f"The model {model!r:.120} does not exist; there is {names}", param="model", code="model_not_found"
        )

    def _complete(self, body: Mapping[str, object], *, chat: bool) -> None:
        request = read_request(body)
        side = self._side(request.model)
        with self.server.encoding:
            prompts = [self._chat_ids(body)] if chat else [self._ids(prompt) for prompt in read_prompts(body)]
        if request.stream and len(prompts) > 1:
            raise Refused(400, "prompt: a stream has one prompt", param="prompt")
        samplings = [self._room(ids, request) for ids in prompts]
        reply = Reply.new(chat, side)
        if request.stream:
            self._stream(side, prompts[0], samplings[0], request, reply)
            return
        answers = []
        with self.server.engine.turn():
            for ids, sampling in zip(prompts, samplings, strict=True):
                answer = Answer()
                for _ in self.server.engine.pieces(side, ids, sampling, answer):
                    pass
                answers.append(answer)
        self._send(200, reply.whole(answers, sum(map(len, prompts))))

    def _chat_ids(self, body: Mapping[str, object]) -> list[int]:
        messages, prefill = read_messages(body)
        return self.server.sides.encoder.prompt_ids(messages, prefill, read_tools(body))

    def _ids(self, prompt: str | list[int]) -> list[int]:
        rows = causal_model(self.server.sides.model).get_input_embeddings().weight.shape[0]
        ids = (
            self.server.sides.encoder.tokenizer(prompt, add_special_tokens=True)["input_ids"]
            if isinstance(prompt, str)
            else prompt
        )
        if not ids or max(ids) >= rows:
            problem = f"token id {max(ids)} is beyond the model's {rows}" if ids else "no tokens in it"
            raise Refused(400, f"prompt: {problem}", param="prompt")
        return list(ids)

    def _room(self, ids: list[int], request: Request) -> Sampling:
        """The request's sampling with a length that the model has positions for."""
        positions = self.server.sides.positions
        left = None if positions is None else positions - len(ids)
        wanted = request.max_tokens
        if left is not None and (left < 1 or (wanted or 1) > left):
            raise Refused(
                400,
                f"This model's maximum context length is {positions} tokens; the prompt has {len(ids)} and "
                f"{wanted or 1} are asked for",
                param="messages" if self.path.startswith("/v1/chat") else "prompt",
                code="context_length_exceeded",
            )
        most = wanted or (DEFAULT_TOKENS if left is None else min(DEFAULT_TOKENS, left))
        return dataclasses.replace(request.sampling, max_tokens=most)

    def _stream(self, side: str, ids: list[int], sampling: Sampling, request: Request, reply: Reply) -> None:
        answer = Answer()
        with self.server.engine.turn(), closing(self.server.engine.pieces(side, ids, sampling, answer)) as pieces:
            self._events(self._pieces(pieces, answer, len(ids), request, reply))

    def _pieces(
        self, pieces: Iterator[str], answer: Answer, prompt_tokens: int, request: Request, reply: Reply
    ) -> Iterator[Mapping[str, object]]:
        if reply.chat:
            yield reply.piece("", first=True)
        for text in pieces:
            yield reply.piece(text)
        yield reply.piece(None, answer.reason)
        if request.usage:
            yield reply.counted(prompt_tokens, answer.tokens)

    def _events(self, events: Iterator[Mapping[str, object]]) -> None:
        """Server-sent events as they come."""
        self._begun = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self._event(json.dumps(event))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _fail(self, refused: Refused) -> None:
        try:
            if self._begun:
                # The status is sent; clients raise on an event with an error in it.
                self._event(json.dumps(refused.body()))
                self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True
            else:
                self._send(refused.status, refused.body())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _send(self, status: int, content: Mapping[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 503):
            self.send_header("Retry-After", "2")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "repbend-fast"}
