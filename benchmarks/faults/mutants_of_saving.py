"""Mutants of checkpoints: writing, verifying, falling back and rotating."""

from __future__ import annotations

from benchmarks.faults.mutant import Mutant

CHECKPOINTS = ("tests/training/test_checkpoints.py",)
STORED = "repbend_fast/runs/stored.py"
CHECKPOINT = "repbend_fast/training/checkpoint.py"

SAVING = [
    Mutant(
        "checkpoints: hashes are not compared",
        STORED,
        'if _stored(path).sha256 != stored["sha256"]:',
        "if False:",
        CHECKPOINTS,
    ),
    Mutant(
        "checkpoints: a file outside the folder may be named",
        STORED,
        'return not os.path.isabs(name) and ".." not in Path(name).parts',
        "return True",
        CHECKPOINTS,
    ),
    Mutant(
        "checkpoints: the newest one is taken as it is",
        CHECKPOINT,
        "        try:\n            checked_manifest(path)\n        except Damaged as error:",
        "        try:\n            pass\n        except Damaged as error:",
        CHECKPOINTS,
    ),
    Mutant(
        "checkpoints: damaged ones stay in the count",
        "repbend_fast/training/resume.py",
        "    set_aside_newer(trainer.run, checkpoint)\n",
        "",
        CHECKPOINTS,
    ),
    Mutant(
        "checkpoints: a folder moved aside does not come back",
        "repbend_fast/runs/folder.py",
        "                os.replace(path, named)\n",
        "                shutil.rmtree(path)\n",
        CHECKPOINTS,
    ),
]
