"""``ask``: both sides answer, a chat goes on from each side's own words, and nothing a model says moves the cursor."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable

import pytest
import torch
from rich.console import Console
from tiny_run import TinyRun

from repbend_fast.cli import main
from repbend_fast.console import saying
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import generate_answers
from repbend_fast.serving.loaded import Sides, load_sides
from repbend_fast.serving.talk import Talk, beside, chat, joined, printable


@pytest.fixture(scope="module")
def sides(whole: TinyRun) -> Sides:
    loaded = load_sides(str(whole.path), answer_tokens=8)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return loaded


def answer_of(sides: Sides, side: str, messages: tuple[Message, ...], prefill: str = "") -> str:
    prompt = Prompt("ordinary", messages[-1].content, messages=messages)
    with sides.on(side) as model:
        return generate_answers(model, sides.encoder, [prompt], prefills=[prefill], max_new_tokens=8)[0]


def test_each_side_goes_on_from_its_own_answers(sides: Sides) -> None:
    talk = Talk(sides, prefill="Sure,", system="Be brief.", max_new_tokens=8)
    first, second = talk.ask("What is rain?"), talk.ask("And tea?")
    assert first["base"] != first["bent"]
    for side in ("base", "bent"):
        start = (Message("system", "Be brief."), Message("user", "What is rain?"))
        assert first[side] == answer_of(sides, side, start, "Sure,")
        whole = (*start, Message("assistant", f"Sure, {first[side]}"), Message("user", "And tea?"))
        assert second[side] == answer_of(sides, side, whole, "Sure,")
    talk.reset()
    assert talk.ask("What is rain?") == first


def test_a_conversation_beyond_the_positions_is_refused_and_stays(sides: Sides) -> None:
    talk = Talk(sides, max_new_tokens=8)
    talk.ask("What is rain?")
    before = dict(talk._turns)
    with pytest.raises(UserError, match="512 positions; shorten it, start anew with /reset"):
        talk.ask("word " * 1000)
    assert talk._turns == before


def typing(lines: Iterable[str | BaseException]) -> Callable[[str], str]:
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_a_chat_takes_commands_and_ends(sides: Sides) -> None:
    said: list[str] = []
    talk = Talk(sides, max_new_tokens=4)
    with saying(said.append):
        chat(talk, typing(["What is rain?", "", "/help", "word " * 1000, "/reset", "/quit", "never read"]))
    assert said[0].startswith("base and bent of ")
    assert [line.partition(":")[0] for line in said[1:3]] == ["base", "bent"]
    assert said[3].startswith("/help is no command")
    assert "positions" in said[4]
    assert said[5:] == ["forgotten"]
    assert talk._turns == {}
    for end in (EOFError(), KeyboardInterrupt()):
        with saying(None):
            chat(talk, typing([end]))


def test_wide_terminals_have_columns_and_narrow_ones_do_not() -> None:
    answers = {"base": "take a [bold]lamp[/bold] \x1b[2J\x07", "bent": "no"}

    def drawn(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        with console.capture() as text:
            console.print(beside("Sure,", answers, width))
        return text.get().splitlines()

    wide, narrow = drawn(100), drawn(60)
    assert any("base" in line and "bent" in line for line in wide)
    assert not any("base" in line and "bent" in line for line in narrow)
    for lines in (wide, narrow):
        assert any("Sure, take a [bold]lamp[/bold] \ufffd[2J\ufffd" in line for line in lines)


def test_the_space_after_a_forced_beginning() -> None:
    assert joined("", "yes") == "yes"
    assert joined("Sure,", "yes") == "Sure, yes"
    assert joined("Sure:\n", "yes") == "Sure:\nyes"
    assert joined("Sure,", "") == "Sure,"
    assert printable("a\tb\nc\rd\x9b") == "a\tb\nc\ufffdd\ufffd"


def test_ask_prints_lines_in_a_pipe_and_json(
    whole: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["ask", str(whole.path), "--max-new-tokens", "4", "--json", "--prefill=Sure", "What is rain?"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "What is rain?"
    assert found["prefill"] == "Sure"
    assert list(found["answers"]) == ["base", "bent"]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is rain?"))
    assert main(["ask", str(whole.model), "--max-new-tokens", "4", "--dtype", "float32"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    for arguments in (["ask", str(whole.path)], ["ask", str(whole.path), ""]):
        assert main(arguments) == 2
        assert "PROMPT is empty" in capsys.readouterr().err
    assert main(["ask", str(whole.path), "hi", "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens=0" in capsys.readouterr().err
