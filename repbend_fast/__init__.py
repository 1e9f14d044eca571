"""repbend-fast: Representation Bending on one consumer GPU.

::

    from repbend_fast import load_config, train, evaluate, export, plan

    config = load_config("demo", {"training.steps": 60})
    run = train(config, say=print)
    print(run.evaluation.after["attack_direct"])
    export(run.folder, "my-safe-model")

Importing this package is quick and imports no torch; a function imports what it needs when it is called. ``docs/python.md`` has the rest.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load_config", "plan", "train"]

# A package of a function's name would take its place here when it is first imported; imported before, it does not.
for _name in __all__:
    if find_spec(f"{__name__}.{_name}") is not None:
        import_module(f"{__name__}.{_name}")

from repbend_fast.api import evaluate, export, load_config, plan, train  # noqa: E402
