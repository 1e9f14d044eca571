"""YAML in and out, with YAML 1.2 scalars, line numbers and no silent duplicates.

PyYAML follows YAML 1.1, where ``1e-5`` is text, ``no`` is false and ``1:30`` is ninety. The rules here are those of the
YAML 1.2 core schema, for reading and for writing, so that what is written reads back as the same value.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from repbend_fast.errors import UserError

Key = tuple[str | int, ...]

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, object] = {}  # noqa: RUF012  PyYAML's own shape


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, object] = {}  # noqa: RUF012


for _tag, _pattern, _first in _SCALARS:
    _compiled = re.compile(f"^(?:{_pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _compiled, ["" if c == "\0" else c for c in _first])
# PyYAML's int constructor reads a leading zero as octal, which YAML 1.2 does not.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def check_text(text: str, prefix: str) -> None:
    """Refuse what no file's name and no file can hold: a zero byte, half of a pair of surrogates.

    Raises:
        UserError: ``text`` has one; ``prefix`` says where it stands.
    """
    if _NO_TEXT.search(text):
        raise UserError(f"{prefix}{ascii(text)[1:-1]}: a zero byte or half a character is no text; leave it out")


def dump_yaml(value: object) -> str:
    """``value`` as block YAML in the order of its keys."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_value(text: str) -> object:
    """The value of one override, such as ``1e-5``, ``true``, ``null`` or ``[1, 2]``.

    Raises:
        yaml.YAMLError: if the text is no YAML.
        UserError: on a duplicate key inside a mapping, and on what ``check_text`` refuses.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), "", {}, ())
    finally:
        loader.dispose()


def is_quoted(text: str) -> bool:
    """Whether ``text`` is one quoted scalar and nothing else, not even a comment."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return False
    return isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') and node.end_mark.index == len(text)


def read_yaml(
    path: Path, name: str, expected: str = "sections such as `model:` and `training:`"
) -> tuple[dict[str, object], dict[Key, int]]:
    """A YAML file as nested values, and the line of every key.

    Args:
        path: The file.
        name: How error messages call it.
        expected: What its top level should hold, for the message of one that is no mapping.

    Returns:
        The mapping, and ``{("training", "steps"): line, …}``.

    Raises:
        UserError: missing or unreadable file, invalid UTF-8, YAML or text, duplicate key, top level that is no mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; `repbend-fast recipes ls` lists the shipped recipes") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    lines: dict[Key, int] = {}
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = {} if node is None else _build(loader, node, (), name, lines, ())
    except yaml.YAMLError as error:
        raise UserError(f"{name}{_position(error)}: invalid YAML: {_problem(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, dict):
        raise UserError(f"{name}: holds a {type(value).__name__}, expected {expected}")
    return value, lines


def _build(
    loader: _Loader, node: yaml.Node, path: Key, name: str, lines: dict[Key, int], parents: tuple[int, ...]
) -> object:
    if id(node) in parents:
        raise UserError(
            f"{name}:{node.start_mark.line + 1}: `*` refers to a part that contains it; write the values out"
        )
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is not allowed", node.start_mark)
    parents = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, i)] = item.start_mark.line + 1
        return [_build(loader, item, (*path, i), name, lines, parents) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node)
        if isinstance(value, str):
            check_text(value, f"{name}:{node.start_mark.line + 1}: " if name else "")
        return value
    mapping: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{name}:{line}: " if name else ""
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}a key must be a word, not a list or a mapping")
        key = str(key_node.value)
        check_text(key, where)
        here = (*path, key)
        if key in mapping:
            first = f" (first in line {lines[here]})" if name else ""
            raise UserError(f"{where}{'.'.join(map(str, here))} is given twice{first}; keep one of them")
        lines[here] = line
        mapping[key] = _build(loader, value_node, here, name, lines, parents)
    return mapping


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(text).split())
