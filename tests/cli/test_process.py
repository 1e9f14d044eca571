"""The command line as a process: exit codes, one line on stderr, nothing heavy imported for help."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repbend_fast.cli", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def test_user_errors_are_one_line_and_exit_code_2() -> None:
    done = run("train", "demo", "training.steps=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: training.steps=0: must be an integer of at least 1\n"


def test_debugging_shows_the_traceback() -> None:
    done = run("train", "demo", "training.steps=0", REPBEND_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_and_recipes_need_no_torch() -> None:
    probe = (
        "import sys; from repbend_fast.cli import main; main(['recipes', 'ls']); "
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules]; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "repbend_fast.cli", "recipes", "show", "demo"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_allocator_s_segments_grow_unless_the_user_says_otherwise() -> None:
    probe = (
        "import os; from repbend_fast.cli import main; main(['recipes', 'ls']); print('conf', "
        "os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")}

    def setting(**given: str) -> str:
        command = [sys.executable, "-c", probe]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**env, **given})
        return done.stdout.splitlines()[-1]

    assert setting() == ("conf expandable_segments:True" if sys.platform == "linux" else "conf None")
    assert setting(PYTORCH_ALLOC_CONF="max_split_size_mb:64") == "conf max_split_size_mb:64"
    assert setting(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") == "conf None"
