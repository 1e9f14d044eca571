"""What transformers reads, counted on our own bar: its two loops bring a bar each, and nothing where there is no
terminal.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from types import ModuleType

from repbend_fast.console import counted

_LOOPS = {
    "transformers.modeling_gguf_pytorch_utils": "reading GGUF tensors",
    "transformers.core_model_loading": "loading weights",
}
_Bar = Callable[..., Generator[object, None, None]]


@contextmanager
def counted_loading() -> Iterator[None]:
    """While entered, the bars of transformers' loops are ours. A version without such a loop keeps what it has."""
    replaced: list[tuple[ModuleType, object]] = []
    begun: list[Generator[object, None, None]] = []
    try:
        for name, what in _LOOPS.items():
            module = importlib.import_module(name)
            if hasattr(module, "tqdm"):
                replaced.append((module, module.tqdm))
                module.tqdm = _bar(what, begun)  # type: ignore[attr-defined]
        yield
    finally:
        for module, bar in replaced:
            module.tqdm = bar  # type: ignore[attr-defined]
        for loop in begun:
            loop.close()  # one that an error left would stay on the terminal


def _bar(what: str, begun: list[Generator[object, None, None]]) -> _Bar:
    def bar(things: Collection[object], desc: str = "") -> Generator[object, None, None]:
        begun.append(counted(what, things))
        return begun[-1]

    return bar
