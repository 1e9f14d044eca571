"""Commands, their options and their help. Imports nothing heavy, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import repbend_fast
from repbend_fast.cli import commands, inspecting, recipes
from repbend_fast.cli import making_data as making
from repbend_fast.cli import plan as planning
from repbend_fast.cli.output import add_output_options
from repbend_fast.errors import UserError
from repbend_fast.words import is_assignment, takes_value

_OVERRIDES = """\
overrides
  key=value         training.steps=60, or steps=60 where the last word is unambiguous;
                    values are YAML: null, true, 1e-5, [1, 2]
  --name value      the same, and the argument names of the published train.sh:
                    --loss_alpha 0.5 --max_steps 300 --q_lora True
  data.sources=FILE                 train on your own file instead of the recipe's data
  data.sources.ultrachat.limit=500  one item of a list, by its format or its number
"""

_EVAL_SETTINGS = """\
settings of an evaluation with suites, attacks or judges
  --limit N            at most so many prompts of each kind and suite
  --max-new-tokens N   length of an answer (default: 64 for the demo's prompts, else 512)
  --chat FILE|NAME     ordinary conversations for perplexity and KL (default: the demo suite's, else the base's answers)
  --batch-size N       prompts at once (default: 32);  --seed N of attacks that draw (default: 0)
  --quantization nf4, --dtype float32 and other settings of the model
                       as everywhere (default: the run's; else none, float32 on a CPU, bfloat16)
"""

_EXIT_CODES = """\
exit codes
  0 done   1 a check failed   2 input to mend, named in one line (REPBEND_DEBUG=1: with traceback)
  130 interrupted, resumable
"""


class _Parser(argparse.ArgumentParser):
    """A parser that remembers its commands and, by every spelling, its options: whatever else looks like an option is
    an override.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.commands: Mapping[str, _Parser] = {}
        self.options: dict[str, argparse.Action] = {}
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action: argparse.Action = super().add_argument(*args, **kwargs)
        self.options.update(dict.fromkeys(action.option_strings, action))
        return action

    def add_commands(self) -> Commands:
        """What ``_command`` adds commands to."""
        groups = self.add_subparsers(title="commands", metavar="COMMAND", required=True)
        self.commands = groups.choices
        return groups

    def error(self, message: str) -> NoReturn:
        if self.commands and message.endswith("required: COMMAND"):
            message = f"a command is missing: {', '.join(self.commands)}"
        raise UserError(f"{message}; see `{self.prog} --help`")


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"  # generic in its stub alone


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments with ``handler`` and, for commands that take them, ``overrides``.

    Raises:
        UserError: unknown command or option, or a missing argument.
        SystemExit: after printing help or the version.
    """
    parser = _build()
    command, words = _command_of(parser, argv)
    if not command.get_default("takes_overrides"):
        return parser.parse_args(list(argv))
    kept, overrides = _split(command, argv)
    # argparse takes a list of recipes in one place only, and options may stand between them. One without its value
    # stays last.
    for word in words:
        kept.remove(word)
    arguments = parser.parse_args([*words, *sorted(kept, key=_place)])
    arguments.overrides = overrides
    return arguments


def _command_of(parser: _Parser, argv: Sequence[str]) -> tuple[_Parser, list[str]]:
    """The parser of the command that is meant, and the words that name it."""
    words: list[str] = []
    for token in argv:
        if not parser.commands:
            break
        if token.startswith("-"):
            continue
        if token not in parser.commands:
            break
        parser = parser.commands[token]
        words.append(token)
    return parser, words


def _place(token: str) -> int:
    return 1 if not token.startswith("-") else 0 if "=" in token else 2


def _split(command: _Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates what argparse knows from overrides, which look like options too."""
    kept: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(argv):
        token = argv[i]
        name, equals, _ = token.partition("=")
        own = command.options.get(name)
        # What follows an option of this command that takes one value is that value, though it read as key=value.
        single = own is not None and own.nargs is None and i + 1 < len(argv) and is_assignment(argv[i + 1])
        follows = not equals and (single or takes_value(argv, i))
        if own is not None and own.nargs == "+":
            numbers = _numbers(argv, i + 1)
            if not equals and not numbers:
                raise UserError(f"{name}: no number follows; see `{command.prog} --help`")
            kept += [token] if equals else []
            kept += [f"{name}={number}" for number in numbers]
            i += len(numbers)
        elif own is not None and own.nargs == 0:
            kept.append(token)
        elif own is not None and own.nargs == "?" and own.choices and not equals:
            kept.append(f"{token}={own.const}")  # alone it must not take a recipe that follows for its value
        elif own is not None:
            kept.append(f"{token}={argv[i + 1]}" if follows else token)
            i += 1 if follows else 0
        elif token.startswith("--"):
            overrides += [token, argv[i + 1]] if follows else [token]
            i += 1 if follows else 0
        else:
            (overrides if is_assignment(token) else kept).append(token)
        i += 1
    return kept, overrides


def _numbers(argv: Sequence[str], start: int) -> list[str]:
    """The numbers from ``start`` on, up to the first token that is none."""
    found: list[str] = []
    for token in argv[start:]:
        try:
            float(token)
        except ValueError:
            break
        found.append(token)
    return found


def _build() -> _Parser:
    parser = _Parser(
        prog="repbend-fast",
        description="Representation Bending (RepBend) safety training of chat models on one GPU or CPU.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"repbend-fast {repbend_fast.__version__}")
    groups = parser.add_commands()
    for add in _COMMANDS:
        add(groups)
    return parser


def _train_command(groups: Commands) -> None:
    train = _command(groups, "train", commands.train, "train a model by a recipe", overrides=True)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe (`recipes ls`) or a YAML file")
    train.add_argument(
        "--dry-run",
        nargs="?",
        const="plain",
        choices=("plain", "full"),
        metavar="full",
        help="print the resolved configuration and stop; --dry-run=full loads the model and prints what is shown for "
        "it",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="go on from the last checkpoint of FOLDER (default: output.folder); without RECIPE its own configuration "
        "is used",
    )
    add_output_options(train)


def _plan_command(groups: Commands) -> None:
    plan = _command(
        groups,
        "plan",
        planning.show,
        "say beforehand whether a recipe fits, with which levers, and how fast it would be",
        overrides=True,
    )
    plan.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe (`recipes ls`) or a YAML file")
    plan.add_argument(
        "--card",
        metavar="NAME",
        help="plan for this card, for example 4060, 3090 or a100 (default: this machine's device)",
    )
    plan.add_argument(
        "--table",
        action="store_true",
        help="one line per quantisation and budget from 8 to 80 GB; without RECIPE for two models",
    )
    plan.add_argument("--json", action="store_true", help="as JSON")


def _report_command(groups: Commands) -> None:
    report = _command(groups, "report", commands.report, "write the page of a run again, or of several side by side")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or one that `eval` wrote; several share one page"
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="where the page goes (default: the run's report.html; of several runs, report.html beside the first)",
    )


def _export_command(groups: Commands) -> None:
    export = _command(
        groups,
        "export",
        commands.export,
        "write a run's result for other programs (merged, adapter or gguf), and check what was written",
    )
    export.add_argument("run", metavar="RUN", help="folder of a run")
    export.add_argument("--out", metavar="DIR", help="new folder (default: RUN/FORMAT)")
    export.add_argument(
        "--format",
        default="merged",
        metavar="merged|adapter|gguf",
        help="safetensors with the adapter in the weights (default), the adapter in PEFT format, or a GGUF file with "
        "Ollama's Modelfile",
    )
    export.add_argument(
        "--type", metavar="TYPE", help="of a GGUF file's weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0"
    )
    export.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load what was written and compare it with the trained model, rounded to NF4 and Q4_K_M too (default)",
    )
    export.add_argument("--bound", type=float, metavar="KL", help="nats per position that the check allows")


def _verify_command(groups: Commands) -> None:
    verify = _command(groups, "verify", commands.verify, "recompute a folder of golden values and compare")
    verify.add_argument("folder", metavar="DIR", help="folder with base_model, adapter, batches and expected.json")
    verify.add_argument(
        "--objective", action="append", metavar="NAME", help="fail if this objective has no case; repeatable"
    )


def _data_command(groups: Commands) -> None:
    data = groups.add_parser("data", help="make data, and look at it before training", description="Data to train on.")
    data_groups = data.add_commands()
    check = _command(
        data_groups, "check", commands.check_data, "counts per role, lengths and bad records", overrides=True
    )
    check.add_argument(
        "target", metavar="RECIPE|FILE", help="a recipe, or a data file (model.name=… adds token counts)"
    )
    check.add_argument("--json", action="store_true", help="as JSON, without the lengths")
    making.add_options(
        _command(
            data_groups,
            "make",
            making.make,
            "let a model write its own training data for a policy; goes on where it stopped",
            overrides=True,
        )
    )


def _env_command(groups: Commands) -> None:
    env = _command(groups, "env", commands.env, "versions, devices, memory and implementations on this machine")
    env.add_argument("--json", action="store_true", help="as JSON")


def _eval_command(groups: Commands) -> None:
    evaluate = _command(
        groups,
        "eval",
        commands.evaluate,
        "measure a run's adapter or a recipe's model; with --suite, --attack, --judge or --adapter any model that "
        "loads",
        overrides=True,
    )
    evaluate.add_argument(
        "target",
        metavar="MODEL_OR_RUN",
        help="folder of a run or a checkpoint, a model or an adapter (folder, GGUF file, hub name, package:NAME), or a "
        "recipe",
    )
    evaluate.add_argument("--adapter", metavar="A", help="PEFT adapter, folder or hub name, of the bent side")
    evaluate.add_argument(
        "--base-of", metavar="FOLDER", help="take the base's answers from another evaluation of the same model"
    )
    for name, metavar, text in (
        ("suite", "NAME|FILE", "prompts: demo, harmbench, advbench, …, a file, NAME:FILE, or owner/name"),
        ("attack", "NAME[:k=v,…]", "direct, prefill, template, …, or all"),
        ("judge", "NAME[:k=v,…]", "rule, classifier, endpoint"),
    ):
        evaluate.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, help=f"{text}; repeatable (docs/evaluating.md)"
        )
    evaluate.add_argument(
        "--out",
        metavar="PATH",
        help="with one of the four options above, or for a model: the folder of the evaluation, which goes on where it "
        "stopped (default: RUN/eval, else runs/eval/NAME). Otherwise the JSON file (default: the run's "
        "evaluation.json; with prompts or settings other than the run's both sides are measured and go to "
        "evaluation-PROMPTS.json beside it; a run without prompts is asked the demo's; for a recipe no file)",
    )
    add_output_options(evaluate)
    evaluate.epilog = f"{_EVAL_SETTINGS}\n{evaluate.epilog}"


def _inspecting_commands(groups: Commands) -> None:
    """Commands on a loaded model, which take the model's settings as overrides."""
    for name, (handler, summary, add_options) in inspecting.COMMANDS.items():
        command = _command(groups, name, handler, summary, overrides=True)
        inspecting.add_target(command)
        add_options(command)


def _compare_command(groups: Commands) -> None:
    compare = _command(
        groups,
        "compare",
        commands.compare,
        "train several methods with equal settings and compare them",
        overrides=True,
    )
    compare.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="recipes or YAML files (default: the demo's, one per method)"
    )
    compare.add_argument("--out", metavar="DIR", help="where runs and results go (default: runs/compare)")
    compare.add_argument(
        "--seeds",
        action="extend",
        nargs="+",
        type=int,
        metavar="N",
        help="rates are tried with the first of them (default: 0)",
    )
    compare.add_argument(
        "--rates",
        action="extend",
        nargs="+",
        type=float,
        metavar="RATE",
        help="that each method tries (default: 5e-4 1e-3 2e-3)",
    )
    compare.add_argument(
        "--recipe-rates",
        action="store_true",
        help="each method tries its recipe's own rate; without --rates, that alone",
    )
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at once, which share the CPU's cores (default: 1)")
    add_output_options(compare, as_json=False)


def _recipes_command(groups: Commands) -> None:
    parser = groups.add_parser(
        "recipes", help="list, show and copy the shipped recipes", description="The shipped recipes."
    )
    sub = parser.add_commands()
    _command(sub, "ls", recipes.ls, "names and what they are for")
    show = _command(sub, "show", recipes.show, "print a recipe with its comments")
    show.add_argument("recipe", metavar="NAME")
    copy = _command(sub, "cp", recipes.cp, "copy a recipe, to change it")
    copy.add_argument("recipe", metavar="NAME")
    copy.add_argument("target", nargs="?", default=".", metavar="DEST", help="file or folder (default: here)")


def _command(
    groups: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    summary: str,
    overrides: bool = False,
) -> _Parser:
    parser = groups.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        usage=f"repbend-fast {_USAGE[name]}" if name in _USAGE else None,
        epilog=_OVERRIDES if overrides else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler, overrides=[], takes_overrides=overrides)
    if overrides:
        parser.add_argument(
            "--with",
            action="append",
            default=[],
            dest="overlays",
            metavar="OVERLAY",
            help="an overlay (`recipes ls`) or a YAML file on top",
        )
    return parser


_USAGE = {
    "train": "train RECIPE [--with OVERLAY] [key=value …] [--name value …] [--dry-run[=full]] [--resume [FOLDER]]\n"
    "                          [--quiet] [--json]",
    "eval": "eval MODEL_OR_RUN [--adapter A] [--suite NAME|FILE]… [--attack NAME[:k=v,…]]… [--judge NAME[:k=v,…]]…\n"
    "                         [--out PATH] [--limit N] [--max-new-tokens N] [--batch-size N] [--seed N]\n"
    "                         [--quantization nf4] [--dtype D] [--quiet] [--json] [--with OVERLAY] [key=value …]",
    **inspecting.USAGE,
    "compare": "compare [RECIPE …] [--out DIR] [--seeds N …] [--rates RATE …] [--recipe-rates] [--jobs N] [--quiet]\n"
    "                            [--with OVERLAY] [key=value …]",
    "plan": "plan [RECIPE] [--with OVERLAY] [key=value …] [--card NAME] [--table] [--json]",
    **making.USAGE,
    "check": "data check RECIPE|FILE [--json] [--with OVERLAY] [key=value …]",
}

# Each adds a command and its options, in the order in which the help names them.
_COMMANDS = (
    _train_command,
    _eval_command,
    _compare_command,
    _plan_command,
    _report_command,
    _export_command,
    _verify_command,
    _data_command,
    _inspecting_commands,
    _recipes_command,
    _env_command,
)
