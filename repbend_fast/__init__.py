"""repbend-fast: Representation Bending on one consumer GPU.

::

    from repbend_fast import load_config, train, evaluate, export, plan

    config = load_config("demo", {"training.steps": 60})
    run = train(config, say=print)
    print(run.evaluation.after["attack_direct"])
    export(run.folder, "my-safe-model")

Importing this package is quick and imports no torch; a function imports what it needs when it is called.
``docs/python.md`` has the rest.
"""

from repbend_fast.api import assess as assess
from repbend_fast.api import evaluate, export, load_config, plan, train
from repbend_fast.api import make_data as make_data

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load_config", "plan", "train"]
