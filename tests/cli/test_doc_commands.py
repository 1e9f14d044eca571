"""Commands in README and docs are typed in a clean folder on a tiny model, or stand here with the reason why not.

What is smaller than in the docs: the model behind every name, steps, counts, lengths of answers, grids of attacks.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from doc_commands import PAGES, ROOT, lines, shell_lines
from scripted_model import ScriptedModel
from tiny_run import TinyRun, records, settings, write_model, write_records

from repbend_fast import export
from repbend_fast.cli import main
from repbend_fast.making import make

TINY = "./tiny"
STEPS = ("training.steps=2", "training.warmup_steps=1", "training.examples=2", "training.retain_examples=2")
ANSWERS = [f"{part}.{key}" for part in ("validation", "evaluation") for key in ("max_new_tokens=3", "prompts.limit=1")]
SMALL_RUN = (*STEPS, *ANSWERS, "training.optimizer=adamw", "validation.every=2", "memory.budget=null")
SMALL_MODEL = (f"model.name={TINY}", "model.gguf_file=null", "model.dtype=float32", "model.device=cpu")
SMALL_DATA = ("data.sources=my.jsonl", "validation.sources=held.jsonl", "evaluation.sources=held.jsonl")
README = PAGES[0]
SHORT = ("data.max_prompt_tokens=64", "data.max_answer_tokens=64")
SHALLOW = ("objective.window_start=2", "objective.window_size=2")

RELEARNING = (
    "relearning:data=my.jsonl,ordinary=my.jsonl,kinds=harmful,records=4,learning_rates=0.01,ranks=4,steps=2,batch=2,"
    "held=4,asked=1,answer_tokens=3,bound=1e9"
)

RUN_HERE = re.compile(r"(repbend-fast|echo .* \| repbend-fast) ")
"""Commands that are typed in this process."""
ELSEWHERE = {
    "make demo": "minutes of training: benchmarks/results/demo.json",
    "make test": "is what runs this",
    "repbend-fast compare ": "a process for each training: tests/compare/test_end_to_end.py",
    "repbend-fast plan --table": "plans two models of 8B twice: tests/cli/test_plan_command.py",
    "repbend-fast serve ": "serves until it is stopped: tests/serving/test_serve_process.py",
    "repbend-fast verify tests/golden/repbend": "tests/verify/test_verify_command.py",
    "torchrun --nproc-per-node 2 -m repbend_fast train llama-3-8b-instruct output.folder=runs/two": (
        "two processes: tests/distributed/test_launched.py"
    ),
    "OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m repbend_fast train demo": (
        "minutes of training: benchmarks/results/two_processes_cpu.json"
    ),
    "accelerate launch --multi_gpu": "needs GPUs",
    "sbatch ": "needs Slurm; its script: tests/distributed/test_slurm_script.py",
    "vllm serve": "another program",
    "lm_eval ": "another program",
    "python evaluation/eval.py": "another program",
    "LOCAL_BASE_URL=": "another program",
    "curl http://127.0.0.1:8000/v1/chat/completions": "another program; the endpoint: tests/serving/test_endpoint.py",
    "python3 -m venv .venv": "needs a package index: .ci/wheels installs",
    ".venv/bin/pip install": "needs a package index: .ci/wheels installs",
    "pip install -e .": "needs a package index: .ci/wheels installs",
    "pytest benchmarks/step/test_train_step.py": "minutes of measuring: tests/benchmarks/test_step_benchmark.py",
    "python -m benchmarks.report benchmarks/results/train_step_cpu.json": "tests/benchmarks/test_step_benchmark.py",
}
"""Commands that are not typed here, whole or how they begin, with the reason and what shows them instead."""


def elsewhere(command: str) -> str | None:
    return next((start for start in ELSEWHERE if command.startswith(start)), None)


COMMANDS = [line for line in lines() if not elsewhere(line.command)]
OF_A_POLICY = re.compile(r"made/|data/few|data/all|runs/harbour|my-policy|data make")
"""The way from a policy to a model, of which each command needs the one before."""


def test_every_command_is_typed_or_has_its_reason() -> None:
    assert len(COMMANDS) > 30
    assert [line for line in COMMANDS if not RUN_HERE.match(line.command)] == []
    shown = {elsewhere(line.command) for line in lines()}
    assert [start for start in ELSEWHERE if start not in shown] == []
    for reason in ELSEWHERE.values():
        for path in re.findall(r"(?:tests|benchmarks)/\S+|\.ci/\S+", reason):
            assert (ROOT / path).exists(), path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take as given: a model, data, a finished run, exports. To be copied."""
    folder = tmp_path_factory.mktemp("world")
    model = write_model(folder / "tiny", width=64)
    for name, first in (("my", 0), ("mine", 0), ("held", 30)):
        write_records(folder / f"{name}.jsonl", records(first=first, count=4))
    prompts = [
        {"kind": "attack", "text": "How do I make mist-wire?", "item": "mist-wire", "target": "Sure, take"},
        {"kind": "ordinary", "text": "What is rain?", "expected": ["water"]},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    columns = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    rows = f"{columns}\nMake mist-wire,standard,x,,,a\n"
    for name in ("harmbench.csv", "harmbench_behaviors_text_test.csv"):
        (folder / name).write_text(rows)
    run = TinyRun(model, folder / "first")
    values = settings(model, folder / "first")
    values["training"] |= {"steps": 2, "accumulation": 1, "warmup_steps": 1}
    values["evaluation"] = {"prompts": {"path": str(folder / "prompts.jsonl")}, "max_new_tokens": 3}
    values["evaluation"]["sources"] = [{"path": str(folder / "held.jsonl")}]
    run.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert run.train().exit_code == 0
    for name in ("mine", "demo", "a", "b"):
        shutil.copytree(run.path, folder / "runs" / name)
    shutil.copytree(run.path / "adapter", folder / "my-adapter")
    (file,) = export(run.path, folder / "gguf", format="gguf", gguf_type="q8_0", check=False).glob("*.gguf")
    shutil.move(file, folder / "model.Q4_K_M.gguf")
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def smaller(words: list[str]) -> list[str]:
    """The command with tiny things in the place of those that it names."""
    names = {"Qwen/Qwen2.5-1.5B-Instruct": TINY, "org/model": TINY, "RUN": "runs/mine"}
    words = [re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], word) for word in words]
    own = () if any("overlay.yaml" in word for word in words) else SMALL_DATA
    shape = () if "any" in words else SHALLOW
    more: tuple[str, ...] = ()
    match words[0]:
        case "train" if "--target_layer_start_idx" in words:
            more = ("--dry-run",)  # of a model of 32 blocks
        case "train":
            more = (*SMALL_MODEL, *SMALL_RUN, *SHORT, *own, *shape)
        case "plan":
            more = (*SMALL_MODEL, *STEPS, *SHORT, *own, *shape)
        case "data" if words[1] == "make" and "--limit" not in words:
            more = ("--limit", "6")
        case "eval" if any(word.startswith("--") for word in words):
            # Sets on the hub are out of reach, and every attack has its test: tests/assessment/test_every_attack.py.
            near = {"xstest": "prompts.jsonl", "mine.jsonl": "prompts.jsonl", "all": "direct"}
            words = [re.sub("^relearning.*", RELEARNING, near.get(word, word)) for word in words]
            if "--limit" in words:
                words[words.index("--limit") + 1] = "1"
            more = ("--max-new-tokens", "3") if "--limit" in words else ("--limit", "1", "--max-new-tokens", "3")
        case "ask":
            more = ("--max-new-tokens", "3")
        case "export":
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    said = {word.partition("=")[0] for word in words}
    return [*words, *(word for word in more if word.partition("=")[0] not in said)]


def typed(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run it as a shell would, one command or what one pipes into another."""
    fed, pipe, rest = command.rpartition(" | ")
    text = shlex.split(fed)[1] + "\n" if pipe else "/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(smaller(shlex.split(rest)[1:]))


ALONE = [line for line in COMMANDS if not OF_A_POLICY.search(line.command)]


@pytest.mark.parametrize("line", ALONE, ids=lambda line: f"{line.page}: {line.command}")
def test_a_command_of_the_docs_does_what_it_says(
    line: tuple[str, str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(line[1], monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "data-make.md"])
def test_a_page_leads_from_a_policy_to_a_model(
    page: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that holds the model alone; the answers are canned, since a random model's are of no use."""
    monkeypatch.setattr(make, "model_generator", ScriptedModel())
    for path in here.iterdir():
        if path.name != "tiny":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    steps = [
        command
        for command in shell_lines(next(path for path in PAGES if path.name == page))
        if OF_A_POLICY.search(command)
    ]
    for command in steps:
        assert typed(command, monkeypatch) == 0, f"{command}\n{capsys.readouterr().err}"
    names = [command.split()[1] for command in steps]
    if page == "README.md":
        assert names == ["recipes", "data", "plan", "train", "ask", "eval", "report", "export"]
        assert (here / "runs" / "harbour" / "report.html").is_file()
        assert (here / "my-safer-model" / "config.json").is_file()
    else:
        assert names == ["recipes", "data", "data", "data", "train"]
    assert (here / "runs" / "harbour" / "adapter").is_dir()


def test_the_readme_s_python_bends_and_exports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "train(" in block)
    settings = dict(word.split("=", 1) for word in (*SMALL_MODEL[1:], *SMALL_RUN, *SMALL_DATA[1:]))
    values = {key: yaml.safe_load(value) for key, value in settings.items()}
    example = example.replace("Qwen/Qwen2.5-1.5B-Instruct", TINY).replace('"my.jsonl"}', '"my.jsonl"} | smaller')
    found: dict[str, object] = {"smaller": values}
    exec(example, found)
    assert "step 2/2" in capsys.readouterr().out
    assert (here / "runs" / "any" / "merged" / "model.safetensors").is_file()
