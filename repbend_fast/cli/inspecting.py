"""``lens``, ``ask`` and ``serve``: a loaded model looked into, talked with, or asked by other programs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from repbend_fast.console import say
from repbend_fast.errors import UserError
from repbend_fast.nearby import own_path

if TYPE_CHECKING:
    from repbend_fast.serving.loaded import Sides

MODEL_OPTIONS = {
    "quantization": ("nf4", "the base in 4 bits"),
    "dtype": ("D", "float32, bfloat16 or float16 (default: the run's; else float32 on a CPU, bfloat16)"),
    "device": ("D", "cpu, cuda or cuda:N (default: the run's; else the best there is)"),
    "revision": ("R", "of a model from the hub"),
}
USAGE = {
    "lens": "lens MODEL_OR_RUN --prompt TEXT [--prefill TEXT] [--adapter A] [--tokens N] [--bending [demo|FILE]]\n"
    "                         [--rows N] [--out FILE] [--with OVERLAY] [key=value …]",
    "ask": "ask MODEL_OR_RUN [PROMPT] [--prefill TEXT] [--system TEXT] [--adapter A] [--max-new-tokens N] [--json]\n"
    "                        [--with OVERLAY] [key=value …]",
    "serve": "serve MODEL_OR_RUN [--adapter A] [--port N] [--host H] [--allow-remote] [--with OVERLAY] [key=value …]",
}


def lens(arguments: Namespace) -> int:
    """``lens``: writes the page with both pictures and their data, or one file, and prints the paths."""
    _at_least(arguments.tokens, "--tokens", 1)
    _at_least(arguments.rows, "--rows", 1)
    if not arguments.prompt.strip():
        raise UserError("--prompt: is empty")
    from repbend_fast.serving.looking import bending_of, check_out, look, write_look

    outs = [own_path(arguments.out)] if arguments.out else []
    for out in outs:
        check_out(out, arguments.bending is not None)
    sides = _load(arguments, 1)
    data = look(sides, arguments.prompt, arguments.prefill, arguments.tokens)
    bending = None
    if arguments.bending is not None:
        bending = bending_of(sides, arguments.bending, arguments.prefill, arguments.rows)
    if not outs:
        home = _home(arguments)
        outs = [home / "lens.html", home / "lens.json"]
    for out in outs:
        for path in write_look(out, data, bending):
            say(f"wrote {path}")
    return 0


def ask(arguments: Namespace) -> int:
    """``ask``: one prompt, from the command line or a pipe, or a chat where somebody types."""
    _at_least(arguments.max_new_tokens, "--max-new-tokens", 1)
    from repbend_fast.serving.talk import Talk, ask_once, chat, is_interactive

    prompt = arguments.prompt
    if prompt is None and not is_interactive():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("PROMPT is empty; type one, or start `repbend-fast ask` in a terminal to chat")
    if prompt is None and arguments.json:
        raise UserError("--json: needs a PROMPT")
    talk = Talk(
        _load(arguments, arguments.max_new_tokens),
        arguments.prefill,
        arguments.system,
        arguments.max_new_tokens,
    )
    if prompt is None:
        chat(talk)
    else:
        ask_once(talk, prompt, arguments.json)
    return 0


def serve(arguments: Namespace) -> int:
    """``serve``: until Ctrl-C."""
    from repbend_fast.serving.http_server import check_address
    from repbend_fast.serving.http_server import serve as answer

    check_address(arguments.host, arguments.port, arguments.allow_remote)
    answer(_load(arguments, 1), arguments.host, arguments.port, allow_remote=arguments.allow_remote)
    return 0


def _load(arguments: Namespace, answer_tokens: int) -> Sides:
    from repbend_fast.serving.loaded import load_sides

    return load_sides(
        arguments.target,
        arguments.adapter,
        _overrides(arguments),
        overlays=arguments.overlays,
        answer_tokens=answer_tokens,
    )


def _overrides(arguments: Namespace) -> list[str]:
    own = {name: getattr(arguments, name) for name in MODEL_OPTIONS}
    return [*arguments.overrides, *(f"model.{name}={value}" for name, value in own.items() if value is not None)]


def _home(arguments: Namespace) -> Path:
    """``lens`` in a run's folder, where ``report`` finds it; else where evaluations go."""
    from repbend_fast.assessment.target import find_subject

    subject = find_subject(arguments.target, arguments.adapter, _overrides(arguments), overlays=arguments.overlays)
    return subject.home.with_name("lens") if subject.home.name == "eval" else subject.home


def _at_least(value: int, name: str, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value}: give a whole number from {least} on")


def add_target(command: ArgumentParser) -> None:
    """Add what names the model, and the settings that it is loaded with."""
    command.add_argument(
        "target",
        metavar="MODEL_OR_RUN",
        help="folder of a run or a checkpoint, a model or an adapter (folder, GGUF file, hub name, package:NAME), or a "
        "recipe",
    )
    command.add_argument("--adapter", metavar="A", help="PEFT adapter, folder or hub name, of the bent side")
    for name, (metavar, text) in MODEL_OPTIONS.items():
        command.add_argument(f"--{name}", metavar=metavar, help=text)


def _lens_options(lens: ArgumentParser) -> None:
    lens.add_argument("--prompt", metavar="TEXT", required=True, help="what is asked")
    lens.add_argument(
        "--prefill",
        metavar="TEXT",
        default="Sure, here is how",
        help="the forced answer of the second picture (default: %(default)r; --prefill= for none)",
    )
    lens.add_argument("--tokens", metavar="N", type=int, default=12, help="columns: the last N tokens (default: 12)")
    lens.add_argument(
        "--bending",
        nargs="?",
        const="demo",
        metavar="demo|FILE",
        help="also draw safe and unsafe prompts' hidden states before and after, from a file's prompts or the demo's",
    )
    lens.add_argument("--rows", metavar="N", type=int, default=32, help="prompts of each kind for it (default: 32)")
    lens.add_argument(
        "--out",
        metavar="FILE",
        help="FILE.html, FILE.svg or FILE.json (default: lens.html and lens.json in RUN/lens, or in runs/eval/NAME)",
    )


def _ask_options(ask: ArgumentParser) -> None:
    ask.add_argument("prompt", nargs="?", metavar="PROMPT", help="without one: a pipe's text, or a chat")
    ask.add_argument("--prefill", metavar="TEXT", default="", help="how every answer is made to begin")
    ask.add_argument("--system", metavar="TEXT", default="", help="a system message before the conversation")
    ask.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="length of an answer (default: 256)")
    ask.add_argument("--json", action="store_true", help="as JSON")


def _serve_options(serve: ArgumentParser) -> None:
    serve.add_argument("--host", metavar="H", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", metavar="N", type=int, default=8000, help="0 for any free one (default: 8000)")
    serve.add_argument(
        "--allow-remote", action="store_true", help="let other machines in; nobody is asked who they are"
    )


COMMANDS: Mapping[str, tuple[Callable[[Namespace], int], str, Callable[[ArgumentParser], None]]] = {
    "lens": (lens, "draw what base and bent would say at every layer and token (logit lens)", _lens_options),
    "ask": (ask, "answer a prompt, or chat in the terminal, with base and bent beside each other", _ask_options),
    "serve": (serve, "serve base and bent to other programs, as an OpenAI-compatible endpoint", _serve_options),
}
"""By name: handler, summary, and what adds the options."""
