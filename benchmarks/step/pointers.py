"""What a Triton kernel does with the tensors it is given: which it reads, which it writes; read off its source.

Pointers are followed through assignments and into the functions that the kernel calls. What is loaded is a value and no
pointer any more, so an index read from one tensor does not count as a write to it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

LOADS, STORES = ("load",), ("store", "atomic_add", "atomic_max", "atomic_min", "atomic_xchg", "atomic_cas")


@dataclass(frozen=True)
class Access:
    """Names of a function's parameters that it reads from, and that it writes to."""

    read: frozenset[str]
    written: frozenset[str]


@cache
def access_of(function: Callable[..., object]) -> Access:
    """The access of a kernel's Python function; a parameter that is found in neither set is only passed on."""
    definition = _definition(function)
    names = [argument.arg for argument in definition.args.args]
    walk = _Walk({name: frozenset((name,)) for name in names}, dict(vars(inspect.getmodule(function) or object)))
    # Twice: in a loop a pointer may come from further down.
    for _ in range(2):
        for statement in definition.body:
            walk.visit(statement)
    return Access(frozenset(walk.read & set(names)), frozenset(walk.written & set(names)))


def _definition(function: Callable[..., object]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@dataclass
class _Walk(ast.NodeVisitor):
    roots: dict[str, frozenset[str]]
    names: dict[str, object]
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def visit_Assign(self, node: ast.Assign) -> None:
        found = self._roots(node.value)
        for target in node.targets:
            for name in _names(target):
                self.roots[name] = self.roots.get(name, frozenset()) | found
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        for name in _names(node.target):
            self.roots[name] = self.roots.get(name, frozenset()) | self._roots(node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = _called(node)
        if called in LOADS:
            self.read |= self._roots(node.args[0])
        elif called in STORES:
            self.written |= self._roots(node.args[0])
            if called != "store":
                self.read |= self._roots(node.args[0])
        else:
            self._into(called, node)
        self.generic_visit(node)

    def _kernel(self, called: str) -> Callable[..., object] | None:
        inner = getattr(self.names.get(called), "fn", None)
        return inner if inspect.isfunction(inner) else None

    def _into(self, called: str, node: ast.Call) -> None:
        inner = self._kernel(called)
        if inner is None:
            return
        access, parameters = access_of(inner), [a.arg for a in _definition(inner).args.args]
        given = [*zip(parameters, node.args), *((word.arg, word.value) for word in node.keywords if word.arg)]
        for name, value in given:
            self.read |= self._roots(value) if name in access.read else frozenset()
            self.written |= self._roots(value) if name in access.written else frozenset()

    def _roots(self, node: ast.AST) -> frozenset[str]:
        if isinstance(node, ast.Call):
            inner = self._kernel(_called(node))
            if _called(node) in LOADS or (inner is not None and access_of(inner).read):
                return frozenset()
        if isinstance(node, ast.Name):
            return self.roots.get(node.id, frozenset())
        return frozenset().union(*map(self._roots, ast.iter_child_nodes(node)))


def _names(target: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
