"""A merged export answers as base + adapter do, and is an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches
from tiny_models import VOCABULARY, tiny_model, wrap
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from repbend_fast.cli import main
from repbend_fast.config import Config, resolved_yaml
from repbend_fast.config.schema import ModelConfig
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.errors import UserError
from repbend_fast.exports.export import export_merged, unmeasured_note
from repbend_fast.runs.folder import RunFolder
from repbend_fast.training.checkpoint import save_adapter

IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ 'own' }}"
    tokenizer.save_pretrained(folder)
    return folder


def _run(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """A run's folder with a trained adapter; returns the logits of base + adapter."""
    config = Config(
        model=ModelConfig(name=str(base), dtype="float32", device="cpu", **settings),
        data=DataConfig(sources=[SourceConfig(path="demo")]),
    )
    run = RunFolder(folder)
    run.path.mkdir()
    run.config.write_text(resolved_yaml(config), encoding="utf-8")
    model = wrap(tiny_model())
    save_adapter(model, run.adapter)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_logits_equal_adapted_logits(base, tmp_path, quantization) -> None:
    expected = _run(base, tmp_path / "run", quantization=quantization)
    out = export_merged(tmp_path / "run", tmp_path / "merged")
    assert out == tmp_path / "merged"
    names = {path.name for path in out.iterdir()}
    assert "config.json" in names
    assert "model.safetensors" in names
    assert not any("adapter" in name or name.endswith(".bin") for name in names)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    with torch.no_grad():
        got = model(input_ids=IDS, use_cache=False).logits
        assert_matches(got, expected, tolerance=1e-5, name="logits")
        assert not torch.allclose(got, tiny_model()(input_ids=IDS, use_cache=False).logits, atol=0.1)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 'own' }}"


def test_layers_of_liger_which_need_a_gpu_are_not_put_into_what_is_exported(base, tmp_path) -> None:
    _run(base, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace("liger: auto", "liger: true").replace("device: cpu", "device: auto"), encoding="utf-8"
    )
    assert "liger: true" in config.read_text(encoding="utf-8")
    assert (export_merged(tmp_path / "run", tmp_path / "merged") / "model.safetensors").is_file()


def test_an_empty_folder_is_filled(base, tmp_path) -> None:
    _run(base, tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_merged(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_without_an_adapter(base, tmp_path) -> None:
    _run(base, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter yet"):
        export_merged(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_keeps_what_it_holds(base, tmp_path) -> None:
    _run(base, tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="out"):
        export_merged(tmp_path / "run", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_the_export_of_an_nf4_run_says_that_it_is_another_model(base, tmp_path, capsys) -> None:
    """With the numbers that the run recorded, of the evaluation where there is one; nothing for other runs, no number
    that is not there.
    """
    _run(base, tmp_path / "plain")
    assert unmeasured_note(tmp_path / "plain") is None
    _run(base, tmp_path / "run", quantization="nf4")
    run = RunFolder(tmp_path / "run")
    note = unmeasured_note(run.path)
    assert note is not None
    assert "anything measured on it" in note
    rows = [{"type": "validation", "step": s, "kl": 0.01 * s, "perplexity": 12.0 + s, "best": s < 3} for s in (1, 2, 3)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"type": "val')
    assert main(["export", str(run.path), "--out", str(tmp_path / "merged")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'merged'}\n"
    lines = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(lines) == 1
    assert "NF4 base, where KL 0.0200 and perplexity 14.00 were measured" in lines[0]
    assert "unquantised base in float32, another model, which nothing has measured" in lines[0]
    run.evaluation.write_text(
        json.dumps({"after": {"kl": 0.5, "perplexity": 3.0, "attack_direct": 0.25}, "best_step": 2})
    )
    assert "KL 0.5000, perplexity 3.00 and attack success 25.0%" in str(unmeasured_note(run.path))
