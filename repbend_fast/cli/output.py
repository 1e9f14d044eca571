"""How a command speaks: as usual, not at all, or one JSON value at its end."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from repbend_fast.console import Say, terminal

QUIET = "say nothing but errors"
JSON = "say nothing while it works, and print the result as JSON"


def add_output_options(parser: ArgumentParser, as_json: bool = True) -> None:
    """``--quiet``, and ``--json`` where the command has a result that can be one."""
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    if as_json:
        parser.add_argument("--json", action="store_true", help=JSON)


def listener(arguments: Namespace) -> Say | None:
    """Where what is said goes: to the terminal, or nowhere."""
    return None if arguments.quiet or getattr(arguments, "json", False) else terminal


def print_json(result: object) -> None:
    """What ``--json`` prints at the end."""
    print(json.dumps(result, indent=1, ensure_ascii=False, default=str))
