"""The functions that users import as a page: ``python -m repbend_fast.cli.api_page > docs/api.md``.

It is made from their signatures and docstrings, so it cannot say anything else than they do.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

import repbend_fast
from repbend_fast import api
from repbend_fast.errors import UserError

_HEAD = """\
# Every function

What `from repbend_fast import …` gives. [python.md](python.md) shows them at work.

This page is made by `python -m repbend_fast.cli.api_page`.
"""
_SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
_NAMES = {"Args": "Arguments", "Returns": "Gives back", "Raises": "Raises"}
_ITEM = re.compile(r"^ {4}(\w[\w, ]*): ", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


def functions() -> list[Callable[..., object]]:
    """Those of the public API, in the order of their file."""
    names: dict[str, object] = vars(repbend_fast)
    own: dict[str, object] = vars(api)
    return [f for name, f in own.items() if inspect.isfunction(f) and names.get(name) is f]


def api_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for function in functions():
        parts += [f"## `{function.__name__}`\n", _signature(function), *_docstring(inspect.getdoc(function) or "")]
    parts += ["## What they return\n", *_returned(api.Run)]
    parts += [f"## `{UserError.__name__}`\n", *_docstring(inspect.getdoc(UserError) or "")]
    return "\n".join(parts).rstrip("\n") + "\n"


def _signature(function: Callable[..., object]) -> str:
    """The call with its defaults, without types: these are in the code, and the words say what is taken."""
    parameters = inspect.signature(function).parameters.values()
    words: list[str] = []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        words.append(f"{parameter.name}{default}")
    call = f"{function.__name__}({', '.join(words)})"
    if len(call) > 100:
        call = f"{function.__name__}(\n    " + ",\n    ".join(words) + ",\n)"
    return f"```python\n{call}\n```\n"


def _docstring(text: str) -> Iterator[str]:
    head, *rest = _SECTION.split(_ROLE.sub(r"`\1`", text).replace("``", "`"))
    yield f"{_flowing(head)}\n"
    for name, body in zip(rest[::2], rest[1::2]):
        yield f"**{_NAMES[name]}**\n"
        items = _ITEM.split(body.strip("\n"))
        if name == "Returns":
            yield f"{_flowing(body)}\n"
            continue
        for item, said in zip(items[1::2], items[2::2]):
            yield f"- `{item}`: {_flowing(said)}"
        yield ""


def _flowing(text: str) -> str:
    """Paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _returned(kind: type) -> Iterator[str]:
    yield f"### `{kind.__name__}`\n"
    yield from _docstring(inspect.getdoc(kind) or "")
    for name, member in vars(kind).items():
        if isinstance(member, property):
            first = (inspect.getdoc(member) or "").replace("``", "`")
            yield f"- `{name}`: {_flowing(first)}"
    yield ""


if __name__ == "__main__":
    print(api_page(), end="")
