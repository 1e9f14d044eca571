"""The README's way from a policy to an exported model, command by command, with a tiny model in the place of a real
one. What is smaller than there: steps, counts, answers' length, and the attacks, which have tests of their own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from scripted_model import ScriptedModel
from tiny_run import write_model

from repbend_fast.cli import main
from repbend_fast.making import make

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
HUB_NAME = "Qwen/Qwen2.5-1.5B-Instruct"
SMALLER = {
    "data": ["--limit", "6"],
    "plan": ["training.examples=2", "training.retain_examples=2"],
    "train": [
        "training.steps=2",
        "training.warmup_steps=1",
        "training.optimizer=adamw",
        "training.examples=2",
        "training.retain_examples=2",
        "validation.every=2",
        "validation.max_new_tokens=4",
        "validation.prompts.limit=2",
        "evaluation.max_new_tokens=4",
        "evaluation.prompts.limit=2",
    ],
    "eval": ["--limit", "1", "--max-new-tokens", "4"],
    "ask": ["--max-new-tokens", "4"],
}


def policy_commands() -> list[str]:
    section = README.partition("## Your own policy and data")[2].partition("\n## ")[0]
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))
    return re.findall(r"^repbend-fast (.*)$", shell, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_readme_leads_from_a_policy_to_an_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make, "model_generator", ScriptedModel())
    write_model(tmp_path / "tiny", width=64)
    names = []
    for command in policy_commands():
        words = shlex.split(command.replace(HUB_NAME, "./tiny"), comments=True)
        names.append(words[0])
        words = ["direct" if word == "all" else word for word in words] + SMALLER.get(words[0], [])
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    assert names == ["recipes", "data", "plan", "train", "ask", "eval", "report", "export"]
    assert (tmp_path / "runs" / "harbour" / "report.html").is_file()
    assert (tmp_path / "my-safer-model" / "config.json").is_file()
    records = [path for path in (tmp_path / "made").glob("*.jsonl") if path.stem in ("train", "validation", "test")]
    assert len(records) == 3
