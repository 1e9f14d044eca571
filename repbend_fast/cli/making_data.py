"""``data make``: training data that a model writes itself."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from repbend_fast import api
from repbend_fast.cli.output import add_output_options, listener, print_json
from repbend_fast.errors import UserError

USAGE = {
    "make": "data make POLICY --model M --out FOLDER|FILE.jsonl [--limit N] [--batch-size N] [--seed N]\n"
    "                              [--with OVERLAY] [--quiet] [--json] [key=value …]"
}
LEAST = {"limit": 1, "batch_size": 1, "seed": 0}


def add_options(parser: ArgumentParser) -> None:
    """The command's own words."""
    parser.add_argument("policy", metavar="POLICY", help="a YAML file, or a shipped policy (`recipes ls`)")
    parser.add_argument(
        "--model",
        metavar="M",
        required=True,
        help="who writes and is trained later: a folder, a GGUF file, a hub name, package:NAME, or a recipe",
    )
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="a folder, or a file.jsonl for the records with the rest beside it"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many of everything, to look at first")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=api.WRITTEN_TOGETHER,
        metavar="N",
        help=f"prompts at once, of each process (default: {api.WRITTEN_TOGETHER})",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="in place of the policy's")
    add_output_options(parser)


def make(arguments: Namespace) -> int:
    """``data make``: makes a data set, or goes on with it, and prints the command that trains on it."""
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number from {least} on")
    overlay = api.make_data(
        arguments.policy,
        arguments.model,
        arguments.out,
        arguments.overrides,
        overlays=arguments.overlays,
        limit=arguments.limit,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        say=listener(arguments),
    )
    if arguments.json:
        made = json.loads(overlay.with_name(overlay.name.replace("overlay.yaml", "made.json")).read_text("utf-8"))
        print_json({"overlay": overlay, **made})
    return 0
