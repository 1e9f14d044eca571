"""Nothing but ``models/surgery.py`` and the mechanisms under ``models/layers/`` changes a model that is built.

Read off the sources: what assigns to a module's forward, class, list of blocks, mode, switches or tables, binds
attributes by name, or registers hooks. What builds a model before any step is prepared is listed by function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "repbend_fast"
MAKERS = ("models/layers/changes.py", "models/layers/truncated.py", "models/layers/switches.py")
"""Where attributes of models are set: undoable changes, and the switches of a pass."""
BUILDERS = {
    ("models/load.py", "load_model"),
    ("models/load.py", "keep_attention_cap"),
    ("models/load.py", "quantize_nf4"),
    ("models/load.py", "_prepare_nf4"),
    ("models/merge.py", "_part_ends"),
    ("models/merge.py", "_join_ends"),
    ("models/adapters.py", "attach_lora"),
    ("planning/shapes.py", "shape_model"),
    ("planning/shapes.py", "_nf4_layers"),
    ("planning/shapes.py", "_make_fake"),
    ("models/load.py", "load_sequence_classifier"),
    ("models/merge.py", "put_adapter"),
    ("evaluation/sides.py", "_adapted"),
    ("assessment/target.py", "bend"),
    ("serving/loaded.py", "load_sides"),
    ("verify/parity.py", "_load"),
}
"""Loading, quantising, merging and attaching: the model that surgery finds."""
TENSORS = {
    ("models/layers/offload.py", "get"),
    ("models/layers/packing.py", "known_mask"),
    ("models/layers/packing.py", "known_on_host"),
    ("models/layers/recompute.py", "recomputable"),
}
"""Marks on a tensor that is no parameter."""
MECHANISMS = {
    "use_masks",
    "use_varlen",
    "use_liger",
    "replace_modules",
    "use_nf4_products",
    "use_low_rank_forward",
    "use_lean_layers",
    "set_dropout_rate",
    "offload_embedding",
    "Changes",
}

ATTRIBUTES = {
    "forward",
    "__class__",
    "layers",
    "weight",
    "bias",
    "data",
    "requires_grad",
    "training",
    "p",
    "_disable_adapters",
} | {
    "generation_config",
    "support_avx512bf16_for_cpu",
}
TABLES = {"__dict__", "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}
CALLS = {
    "requires_grad_",
    "eval",
    "train",
    "set_attn_implementation",
    "add_module",
    "register_module",
    "set_submodule",
} | {
    "register_buffer",
    "register_parameter",
}


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
    }


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.Assign, ast.Delete)):
        found = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
        found = [node.target]
    else:
        return []
    for target in found:
        if isinstance(target, (ast.Tuple, ast.List)):
            found += target.elts
    return found


def _is_table(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "vars"
    return isinstance(node, ast.Attribute) and node.attr in TABLES


def _changes_a_model(node: ast.AST, imported: set[str]) -> bool:
    for target in _targets(node):
        if isinstance(target, ast.Subscript) and _is_table(target.value):
            return True
        if isinstance(target, ast.Attribute) and target.attr in ATTRIBUTES and not _is_self(target.value):
            return True
    if not isinstance(node, ast.Call):
        return False
    name = (
        node.func.id
        if isinstance(node.func, ast.Name)
        else node.func.attr
        if isinstance(node.func, ast.Attribute)
        else ""
    )
    if name in ("setattr", "delattr", "__setattr__", "__delattr__"):
        return not node.args or not _is_self(node.args[0])
    if not isinstance(node.func, ast.Attribute):
        return False
    if name.startswith("register_") and name.endswith("_hook"):
        return True
    if name in CALLS:
        of_a_module = isinstance(node.func.value, ast.Name) and node.func.value.id in imported
        return not of_a_module and ast.unparse(node.func.value) != "super()"
    return name in ("update", "pop", "setdefault", "clear") and _is_table(node.func.value)


def _is_self(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "super()")


def changes(path: str, text: str) -> Iterator[tuple[str, str, str]]:
    """File, innermost function, and the line of everything in the file that changes a model."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if _changes_a_model(node, imported):
            yield path, function, f"{path}:{getattr(node, 'lineno', 0)} in {function}"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    tree = ast.parse(text)
    imports = [
        alias for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    ]
    # A function of a module that is named like a method of a model: ``api.train(recipe)``.
    imported = {alias.asname or alias.name for alias in imports}
    return walk(tree, "")


def mechanisms_used(path: str, text: str) -> list[str]:
    """The mechanisms that a file imports, or calls by attribute."""
    names = [
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    names += [
        node.func.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    return [f"{path}: {name}" for name in names if name in MECHANISMS]


def test_nothing_else_changes_a_model() -> None:
    files = {path: text for path, text in sources().items() if path not in MAKERS}
    found = [place for path, text in files.items() for place in changes(path, text)]
    assert [where for path, function, where in found if (path, function) not in BUILDERS | TENSORS] == []
    # A builder that builds no more must not stay on the list.
    assert {(path, function) for path, function, _ in found} == BUILDERS | TENSORS


def test_mechanisms_are_used_by_surgery_alone() -> None:
    files = {path: text for path, text in sources().items() if not path.startswith("models/layers/")}
    used = [where for path, text in files.items() for where in mechanisms_used(path, text)]
    # ``models`` offers the low-rank forward to loops of others.
    assert [where for where in used if not where.startswith("models/surgery.py")] == [
        "models/__init__.py: use_low_rank_forward"
    ]
    assert {where.split(": ")[1] for where in used if where.startswith("models/surgery.py")} == MECHANISMS - {
        "replace_modules"
    }


@pytest.mark.parametrize(
    "line",
    [
        "norm.forward = lean",
        "model.layers[0].mlp.forward = lean",
        "block.forward, block.other = lean, None",
        "module.__dict__['forward'] = lean",
        "vars(module)['forward'] = lean",
        "vars(module).update(forward=lean)",
        "del module.__dict__['forward']",
        "del module.forward",
        "module.__dict__.pop('forward')",
        "setattr(module, name, lean)",
        "object.__setattr__(module, name, lean)",
        "delattr(module, name)",
        "layer.__class__ = Lean",
        "body.layers = nn.ModuleList(wrapped)",
        "body._modules['layers'] = wrapped",
        "module._parameters[name] = parameter",
        "parameter.data = parameter.data.half()",
        "parameter.requires_grad = True",
        "parameter.requires_grad_(True)",
        "module.training = False",
        "for module.training in modes: pass",
        "model.train()",
        "model.eval()",
        "module.register_forward_hook(hook)",
        "module.register_full_backward_pre_hook(hook)",
        "layer._disable_adapters = True",
        "model.generation_config = greedy",
        "head.weight = embedding.weight",
        "dropout.p = 0.0",
    ],
)
def test_a_change_anywhere_else_is_found(line) -> None:
    whole = sources()
    for path in ("step/runner.py", "models/decoder.py", "models/surgery.py", "models/layers/lean.py"):
        added = f"{whole[path]}\n\ndef other(model):\n    {line}\n"
        assert [function for _, function, _ in changes(path, added)] == ["other"], path


@pytest.mark.parametrize("line", ["use_lean_layers(model)", "lean.use_lean_layers(model)"])
def test_a_mechanism_used_elsewhere_is_found(line) -> None:
    text = (
        "from repbend_fast.models.layers import lean\nfrom repbend_fast.models.layers.lean import "
        f"use_lean_layers\n{line}\n"
    )
    assert "step/runner.py: use_lean_layers" in mechanisms_used("step/runner.py", text)


@pytest.mark.parametrize(
    "line",
    [
        "self.layers = layers",
        "object.__setattr__(self, name, value)",
        "layers = [1]",
        "hidden = layer.forward(x)",
        "train(config)",
        "api.train(config)",
        "super().train(resume)",
        "names.update(others)",
    ],
)
def test_what_changes_no_model_is_not_found(line) -> None:
    assert list(changes("step/runner.py", f"from repbend_fast import api\n\ndef own(self):\n    {line}\n")) == []
