"""Evaluation prompts: the demo's own, and the common evaluation sets as files or from the hub."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from repbend_fast.data.conversation import BadField, message_list, tool_list
from repbend_fast.data.reading import Unreadable, read_rows
from repbend_fast.data.records import Message
from repbend_fast.data.settings import PromptsConfig, SourceConfig
from repbend_fast.errors import UserError
from repbend_fast.nearby import is_hub_name, nearest, own_path

Kind = Literal["attack", "ordinary", "borderline"]
KINDS: tuple[Kind, ...] = ("attack", "ordinary", "borderline")
CONTEXT_JOINT = "\n\n---\n\n"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to the model.

    ``expected``: lower-case keywords (each begins a word) of which a helpful answer has at least ``min_expected``;
    empty = not checked. ``item``: what an attack asks for, as the judge should find it named. ``source_id``: where the
    prompt comes from. ``messages``: the whole conversation where it is more than the one user turn ``text``.
    ``target``: how a complying answer begins, where the set says so; ``answer``: a whole one, where it holds one.
    ``tools``: a JSON list of the tools that the template offers, as of a record; "" = none.
    """

    kind: Kind
    text: str
    expected: tuple[str, ...] = ()
    item: str = ""
    source_id: str = ""
    messages: tuple[Message, ...] | None = None
    min_expected: int = 1
    target: str = ""
    answer: str = ""
    tools: str = ""

    def conversation(self) -> tuple[Message, ...]:
        """The turns up to and including the request."""
        return self.messages if self.messages is not None else (Message("user", self.text),)

    def asking(self, change: Callable[[str], str]) -> Prompt:
        """The same with its request, the text of the last turn of the user, changed."""
        if self.messages is None:
            return replace(self, text=change(self.text))
        last = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=len(self.messages) - 1)
        turns = list(self.messages)
        turns[last] = replace(turns[last], content=change(turns[last].content))
        return replace(self, text=change(self.text), messages=tuple(turns))


Row = Mapping[str, Any]
Reader = Callable[[Row, str], Prompt | None]
"""A row's prompt, by its fields and where it stands; None where the set is measured without it."""


def load_prompts(config: PromptsConfig, *, of_set: str | None = None, subset: str | None = None) -> list[Prompt]:
    """Prompts of ``config.path``: ``demo``, or a file, a folder or a hub data set whose columns tell their format.

    Files are CSV, TSV, JSON or JSONL, all of them also with ``.gz``, or parquet. ``config.split`` is the hub's and the
    demo's. ``config.limit`` takes that many of each kind, spread evenly over the file. ``of_set``: the published set
    (a key of ``SETS``) that it has to be; columns alone do not tell all of them apart. ``subset``: the hub's. Raises
    ``UserError`` naming file and line.
    """
    if config.path == "demo":
        from repbend_fast.data import demo

        prompts = demo.prompts("test" if config.split is None else config.split)
    else:
        prompts = _read(config, of_set, subset)
    return limit_per_kind(prompts, config.limit)


def limit_per_kind(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` prompts of each kind, at even distances, so that every part of a sorted file is seen.

    No item is asked for a second time before every other one was once: at even distances alone, a file that asks for
    its items in turn would give few of them.
    """
    if limit is None:
        return prompts
    return [prompt for kind in KINDS for prompt in _some([p for p in prompts if p.kind == kind], limit)]


def _some(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """``limit`` of ``prompts`` in their order: whole rounds of the items, then a part of the next round."""
    asked, rounds = Counter[str](), defaultdict[int, list[int]](list)
    for number, prompt in enumerate(prompts):
        rounds[asked[prompt.item]].append(number)
        asked[prompt.item] += bool(prompt.item)  # without an item a prompt is one of its own
    kept: list[int] = []
    for members in rounds.values():  # a round is begun after the one before it, so they stand in order
        count = min(limit - len(kept), len(members))
        kept += [members[i * len(members) // count] for i in range(count)]
    return [prompts[number] for number in sorted(kept)]


def _read(config: PromptsConfig, of_set: str | None, subset: str | None) -> list[Prompt]:
    """All prompts of a file, a folder or a data set. One without prompts, an unknown set of columns or a bad row is a
    ``UserError``.
    """
    path = own_path(config.path)
    if not path.exists() and not is_hub_name(config.path):
        raise UserError(
            f"prompts.path={path}: no such file; give a CSV, JSON, JSONL or parquet file, or `demo`{nearest(str(path))}"
        )
    endings = [suffix.lower() for suffix in path.suffixes]
    has_types = not path.is_file() or ".parquet" in endings
    found = []
    source = (
        SourceConfig(path=config.path)
        if path.is_file()
        else SourceConfig(path=config.path, subset=subset, split=config.split)
    )
    for row in read_rows(source):
        where = f"{config.path}: entry {row.entry}" if row.entry else row.origin
        if isinstance(row, Unreadable):
            raise UserError(_problem(row, where, path))
        if path.is_file() and ".json" in endings and not row.entry:
            raise UserError(f"{config.path}: expected a list of prompts, or an object whose `data` is one")
        fields = {name: str(value) if has_types and type(value) is int else value for name, value in row.fields.items()}
        reader = _reader(fields, where) if of_set is None else _reader_of(of_set, fields, where)
        prompt = reader(fields, where)
        found += [] if prompt is None else [prompt]
    if not found:
        raise UserError(f"{config.path}: no prompts in this file")
    return found


def _problem(row: Unreadable, where: str, path: Path) -> str:
    if row.kind == "cells":
        return (
            f"{where}: {'fewer' if row.missing > 0 else 'more'} fields than the header has; quote fields that "
            "contain commas"
        )
    if row.kind == "object":
        return f"{where}: expected an object with named fields, {row.reason.rpartition(', ')[2]}"
    if row.kind == "utf8":
        return f"{path}: not UTF-8{_bad_byte(path)}; save the file as UTF-8"
    return f"{row.origin}: {row.reason.replace('invalid', 'not valid', 1)}"


def _bad_byte(path: Path) -> str:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return f" at byte {error.start}"
    except OSError:
        pass
    return ""


def _reader(row: Row, where: str) -> Reader:
    """The reader for a row's columns; every set is known by columns that no other one has."""
    columns = set(row)
    for needed, reader in READERS:
        if needed <= columns:
            return reader
    known = "; ".join(", ".join(sorted(needed)) for needed, _ in READERS)
    raise UserError(f"{where}: unknown columns {_listed(columns)}; known sets of columns: {known}{_nearly(columns)}")


def _nearly(columns: set[Any]) -> str:
    """Which columns are missing for the set that lacks the fewest; nothing where none of them is near."""
    forms = [form for forms in SETS.values() for form, _ in forms if len(form & columns) * 2 >= len(form)]
    missing = min((form - columns for form in forms), key=len, default=frozenset())
    if missing:
        return f"; {_listed(missing)} missing?"
    names = [name for name, forms in SETS.items() if any(form <= columns for form, _ in forms)]
    return f"; give it as {' or '.join(f'{name}:FILE' for name in names)} (eval --suite)" if names else ""


def _reader_of(name: str, row: Row, where: str) -> Reader:
    """The reader of the published set ``name`` for the form that the row has; sets come in more than one."""
    columns = set(row)
    for needed, reader in SETS[name]:
        if needed <= columns:
            return reader
    needed = max((needed for needed, _ in SETS[name]), key=lambda form: (len(form & columns), -len(form)))
    missing = needed - columns
    raise UserError(
        f"{where}: {name} needs the column{'s' if len(missing) > 1 else ''} {_listed(missing)}; "
        f"found are {_listed(columns)}"
    )


def _listed(columns: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, columns)))


def _field(row: Row, name: str, where: str, *, optional: bool = False) -> str:
    value = row.get(name)
    if optional and (value is None or value == ""):
        return ""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: field {name!r} is {'empty' if value in ('', None) or isinstance(value, str) else 'not text'}"
        )
    return value.strip()


def _one_of(row: Row, name: str, allowed: tuple[str, ...], where: str) -> str:
    value = _field(row, name, where)
    if value not in allowed:
        raise UserError(f"{where}: field {name!r} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def _with_context(behavior: str, context: str) -> str:
    return f"{context}{CONTEXT_JOINT}{behavior}" if context else behavior


def _target(row: Row, name: str, where: str) -> str:
    """How a complying answer begins or reads, where the row says so."""
    return _field(row, name, where, optional=True) if name in row else ""


def _harmbench(row: Row, where: str) -> Prompt:
    text = _with_context(_field(row, "Behavior", where), _field(row, "ContextString", where, optional=True))
    return Prompt("attack", text, source_id=_field(row, "BehaviorID", where), target=_target(row, "target", where))


def _harmbench_without_copyright(row: Row, where: str) -> Prompt | None:
    """The behaviours that words can be judged for: those on copyright need hashes of the works."""
    return None if row.get("FunctionalCategory") == "copyright" else _harmbench(row, where)


def _repbend_json(row: Row, where: str) -> Prompt:
    text = _with_context(_field(row, "behavior", where), _field(row, "context", where, optional=True))
    return Prompt("attack", text, source_id=where, target=_target(row, "default_target", where))


def _advbench(row: Row, where: str) -> Prompt:
    return Prompt("attack", _field(row, "goal", where), source_id=where, target=_target(row, "target", where))


def _jailbreakbench(row: Row, where: str) -> Prompt:
    return Prompt(
        "attack",
        _field(row, "Goal", where),
        source_id=_field(row, "Behavior", where),
        target=_target(row, "Target", where),
    )


def _jailbreakbench_benign(row: Row, where: str) -> Prompt:
    return Prompt("borderline", _field(row, "Goal", where), source_id=_field(row, "Behavior", where))


def _strongreject(row: Row, where: str) -> Prompt:
    return Prompt("attack", _field(row, "forbidden_prompt", where), source_id=_field(row, "category", where))


def _xstest(row: Row, where: str) -> Prompt:
    kind = _field(row, "type", where)
    label = (
        _one_of(row, "label", ("safe", "unsafe"), where)
        if "label" in row
        else ("unsafe" if kind.startswith("contrast_") else "safe")
    )
    return Prompt(
        "attack" if label == "unsafe" else "borderline",
        _field(row, "prompt", where),
        source_id=_field(row, "id", where),
    )


def _wildjailbreak(row: Row, where: str) -> Prompt:
    kind = _one_of(row, "data_type", ("adversarial_harmful", "adversarial_benign"), where)
    return Prompt(
        "attack" if kind == "adversarial_harmful" else "borderline",
        _field(row, "adversarial", where),
        source_id=where,
    )


def _prompt_column(kind: Kind) -> Reader:
    """The form that copies on the hub and OR-Bench share: a request in ``prompt``, and nothing that tells its kind."""

    def read(row: Row, where: str) -> Prompt:
        text = _field(row, "prompt", where)
        context = _field(row, "context", where, optional=True) if "context" in row else ""
        return Prompt(kind, _with_context(text, context), source_id=where, target=_target(row, "target", where))

    return read


def _own(row: Row, where: str) -> Prompt:
    """A request as ``text``, or a conversation as ``messages``, which may offer ``tools``; with both, ``text`` is what
    judges read: where a tool's result asks for something, it is not the user's.
    """
    try:
        messages = None if row.get("messages") is None else message_list(row["messages"], "user")
        tools = tool_list(row)
    except BadField as reason:
        raise UserError(f"{where}: {reason}") from None
    said = next((m.content for m in reversed(messages or ()) if m.role == "user"), "")
    expected, at_least = row.get("expected", []), row.get("min_expected", 1)
    if isinstance(expected, str):
        expected = [word for word in expected.split("|") if word]
    if not isinstance(expected, list) or not all(isinstance(word, str) and word for word in expected):
        raise UserError(f"{where}: field 'expected' must be a list of words, or words joined by |")
    if not str(at_least).isdigit() or int(at_least) < 1:
        raise UserError(f"{where}: field 'min_expected' is {at_least!r}; give a whole number from 1 on")
    return Prompt(
        _one_of(row, "kind", KINDS, where),  # type: ignore[arg-type]
        said if said and row.get("text") is None else _field(row, "text", where),
        tuple(word.lower() for word in expected),
        _field(row, "item", where, optional=True),
        where,
        messages,
        min_expected=int(at_least),
        target=_target(row, "target", where),
        answer=_target(row, "answer", where),
        tools=tools,
    )


Form = tuple[frozenset[str], Reader]
"""Columns that a set needs, and its reader."""

_HARMBENCH = frozenset({"Behavior", "ContextString", "BehaviorID"})
_JAILBREAKBENCH = frozenset({"Goal", "Target", "Behavior", "Category"})
_STRONGREJECT = frozenset({"forbidden_prompt", "category"})
_XSTEST = frozenset({"id", "prompt", "type"})
_ADVBENCH = frozenset({"goal", "target"})
_WILDJAILBREAK = frozenset({"adversarial", "data_type"})
_REPBEND = frozenset({"behavior", "default_target"})
_PROMPTS = frozenset({"prompt", "category"})

READERS: tuple[Form, ...] = (
    (frozenset({"kind", "text"}), _own),
    (frozenset({"kind", "messages"}), _own),
    (_HARMBENCH, _harmbench),
    (_JAILBREAKBENCH, _jailbreakbench),
    (_STRONGREJECT, _strongreject),
    (_XSTEST, _xstest),
    (_ADVBENCH, _advbench),
    (_REPBEND, _repbend_json),
    (_WILDJAILBREAK, _wildjailbreak),
)
"""By columns alone; every set is known by some that no other one has."""

SETS: Mapping[str, tuple[Form, ...]] = {
    "harmbench": (
        (_HARMBENCH, _harmbench_without_copyright),
        (_REPBEND, _repbend_json),
        (_PROMPTS, _prompt_column("attack")),
    ),
    "advbench": ((_ADVBENCH, _advbench), (frozenset({"prompt", "target"}), _prompt_column("attack"))),
    "jailbreakbench": ((_JAILBREAKBENCH, _jailbreakbench),),
    "jailbreakbench-benign": ((_JAILBREAKBENCH, _jailbreakbench_benign),),
    "strongreject": ((_STRONGREJECT, _strongreject), (_PROMPTS, _prompt_column("attack"))),
    "xstest": ((_XSTEST, _xstest),),
    "wildjailbreak": ((_WILDJAILBREAK, _wildjailbreak),),
    "or-bench": ((_PROMPTS, _prompt_column("borderline")),),
    "or-bench-toxic": ((_PROMPTS, _prompt_column("attack")),),
}
"""The forms that each published set comes in: the authors' own, and copies of it."""
