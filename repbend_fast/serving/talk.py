"""``ask``: one prompt, or a small chat in the terminal, answered by base and bent beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from repbend_fast.console import note, say, show, terminal_console
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.serving.loaded import Sides

NARROW = 72
"""Columns of a terminal in which two answers stand below each other."""
HELP = "/reset forgets what was said, /quit or Ctrl-D ends"
_CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""A model's escape codes would write to the terminal, not on it."""


@dataclass
class Talk:
    """A conversation with each side, which goes on from its own answers. ``prefill``: how every answer is made to
    begin.
    """

    sides: Sides
    prefill: str = ""
    system: str = ""
    max_new_tokens: int = 256
    _turns: dict[str, tuple[Message, ...]] = field(default_factory=dict)

    def ask(self, text: str) -> dict[str, str]:
        """The answers by side, without the prefill; both are part of the conversation from now on.

        Raises:
            UserError: prompt and answer are longer than the model's positions. The conversation is as before.
        """
        start = (Message("system", self.system),) if self.system else ()
        asked = {side: (*self._turns.get(side, start), Message("user", text)) for side in self.sides.names}
        self._check_room(asked)
        answers = {}
        for side, messages in asked.items():
            prompt = Prompt("ordinary", text, messages=messages)
            with self.sides.on(side) as model:
                answers[side] = generate_answers(
                    model,
                    self.sides.encoder,
                    [prompt],
                    prefills=[self.prefill],
                    max_new_tokens=self.max_new_tokens,
                    batch_size=1,
                )[0]
        self._turns = {
            side: (*messages, Message("assistant", joined(self.prefill, answers[side])))
            for side, messages in asked.items()
        }
        return answers

    def _check_room(self, asked: Mapping[str, tuple[Message, ...]]) -> None:
        encoder, positions = self.sides.encoder, self.sides.positions
        cut = encoder.truncated.prompts
        longest = max(len(encoder.prompt_ids(messages, self.prefill)) for messages in asked.values())
        if encoder.truncated.prompts > cut or (positions is not None and longest + self.max_new_tokens > positions):
            raise UserError(
                f"the conversation and an answer of {self.max_new_tokens} tokens are longer than the model's "
                f"{positions or encoder.max_prompt_tokens} positions; shorten it, start anew with /reset, or lower "
                "--max-new-tokens"
            )

    def reset(self) -> None:
        """Forget what was said."""
        self._turns = {}


def joined(prefill: str, answer: str) -> str:
    """The whole answer. The space between a forced beginning and what follows is the answer's, which has lost it."""
    return f"{prefill}{'' if not answer or not prefill or prefill[-1].isspace() else ' '}{answer}"


def ask_once(talk: Talk, prompt: str, as_json: bool) -> None:
    """One prompt, shown on a terminal or as plain lines, or printed as JSON."""
    answers = talk.ask(prompt)
    if as_json:
        record = {
            "model": talk.sides.name,
            "adapter": talk.sides.adapter,
            "prompt": prompt,
            "system": talk.system,
            "prefill": talk.prefill,
            "max_new_tokens": talk.max_new_tokens,
            "answers": answers,
        }
        print(json.dumps(record, ensure_ascii=False, indent=2))
    else:
        show_answers(talk.prefill, answers)


def chat(talk: Talk, read: Callable[[str], str] = input) -> None:
    """Ask what is typed until /quit, Ctrl-D or Ctrl-C; what goes wrong with one prompt ends nothing."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` its arrow keys and its history
    say(f"{' and '.join(talk.sides.names)} of {talk.sides.name}; {HELP}")
    while True:
        try:
            text = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            talk.reset()
            say("forgotten")
        elif text.startswith("/") and " " not in text:
            say(f"{text} is no command; {HELP}")
        elif text:
            try:
                show_answers(talk.prefill, talk.ask(text))
            except UserError as error:
                note(str(error))
            except KeyboardInterrupt:
                note("interrupted; this prompt was not answered")


def show_answers(prefill: str, answers: Mapping[str, str]) -> None:
    """Beside each other on a terminal that is wide enough, below each other on a narrow one, else plain lines."""
    console = terminal_console()
    if not console.is_terminal:
        for side, answer in answers.items():
            heading = f"{side}: " if len(answers) > 1 else ""
            say(printable(f"{heading}{joined(prefill, answer)}"))
        return
    show(beside(prefill, answers, console.width))


def beside(prefill: str, answers: Mapping[str, str], width: int) -> RenderableType:
    """What ``rich`` draws of the answers in a terminal of this width; the forced beginning is dim."""
    panels = [
        Panel(
            Text.assemble((printable(prefill), "dim"), printable(joined(prefill, answer)[len(prefill) :])),
            title=side,
            title_align="left",
            border_style="blue" if side == "base" else "green",
        )
        for side, answer in answers.items()
    ]
    if len(panels) < 2 or width < NARROW:
        return Group(*panels)
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table


def printable(text: str) -> str:
    """Without control characters: what a model says moves no cursor."""
    return text.translate(_CONTROLS)


def is_interactive() -> bool:
    """Whether somebody types."""
    return sys.stdin.isatty()
