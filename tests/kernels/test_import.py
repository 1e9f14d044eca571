"""The package stands alone: torch is all it needs, and its folder hides no other package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCK = """
import sys
import torch

# torch and what it requires itself; numpy is none of it.
ALLOWED = {"torch", "torchgen", "functorch", "repbend_kernels", "typing_extensions", "sympy", "mpmath", "networkx"}
ALLOWED |= {"jinja2", "markupsafe", "filelock", "fsspec", "op_calls", "kernel_compare"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if not top.startswith("_sysconfigdata") and top not in sys.stdlib_module_names and top not in ALLOWED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

for name in list(sys.modules):
    if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith("torch") and name != "__main__":
        del sys.modules[name]
sys.meta_path.insert(0, Blocked())
try:
    import triton
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the block does not work")
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
"""
"""Nothing but torch and what it requires can be imported from here on."""

ONLY_TORCH = f"""{BLOCK}
import repbend_kernels as rk
hidden = torch.randn(2, 3, 8, requires_grad=True)
stream, loss = rk.bend_tap(hidden, torch.randn(2, 8), torch.tensor([0, 5]))
kl = rk.linear_kl_div(stream.reshape(6, 8), torch.randn(6, 8), torch.randn(10, 8))
(loss + kl + rk.pairwise_cosine(stream) + rk.window_distance([stream], [torch.randn(2, 3, 8)], None)).backward()
assert hidden.grad.abs().sum() > 0
print("ok")
"""


def run(code: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_works_with_only_torch(tmp_path) -> None:
    result = run(ONLY_TORCH, tmp_path, [ROOT / "kernels"])
    assert result.stdout.strip() == "ok", result.stderr


def test_import_leaves_triton_and_transformers_alone(tmp_path) -> None:
    code = (
        "import sys, repbend_kernels; print(sorted({'triton', 'transformers', 'numpy.testing', 'repbend_fast'} & "
        "set(sys.modules)))"
    )
    assert run(code, tmp_path, [ROOT / "kernels"]).stdout.strip() == "[]"


def test_the_folder_does_not_hide_a_package_named_kernels(tmp_path) -> None:
    """From the project's root, as `python -c` and pytest put it first on the path."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("ORIGIN = 'the installed package'\n")
    result = run("import kernels; print(kernels.ORIGIN)", ROOT, [ROOT, tmp_path / "site"])
    assert result.stdout.strip() == "the installed package", result.stderr


def test_the_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
