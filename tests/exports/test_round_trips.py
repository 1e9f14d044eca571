"""What an export gives back is what was trained, for every base and format; and the check sees when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from export_runs import ATTENTION, ExportRun, greedy
from tiny_models import FAMILIES

from repbend_fast.cli import main
from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import CheckFailedError, UserError
from repbend_fast.exports import check_export, export, gguf_file, low_rank, merged
from repbend_fast.exports.export import export_run
from repbend_fast.exports.request import Request
from repbend_fast.models.load import load_model
from repbend_fast.runs.folder import RunFolder, only_writer

IDS = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(5))
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "tied bfloat16": {"tied": True, "dtype": "bfloat16"},
    "nf4 on an adapter": {"quantization": "nf4", "own": True},
}


@pytest.fixture(autouse=True)
def few_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_export, "FORMATS", ("nf4",))


def exported(run: ExportRun, kind: str, **settings: Any) -> tuple[Path, Any]:
    out = run.folder / kind
    check = export_run(Request(run.run, out, kind, **settings))
    assert check is not None
    return out, check


def as_trained(run: ExportRun, check: Any) -> None:
    exact = run.dtype == "float32"
    first = check.rows[0]
    assert first.kl < (1e-8 if exact else 5e-3)
    assert abs(first.left - 1) < (1e-3 if exact else 0.1)
    assert check.differences == []
    assert "records of the run's data" in check.what


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_what_is_loaded_again_is_what_was_trained(base: str, kind: str, tmp_path: Path) -> None:
    run = ExportRun(tmp_path, **BASES[base]).write()
    out, check = exported(run, kind)
    as_trained(run, check)
    if kind == "merged":
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert model.dtype == getattr(torch, run.dtype)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == run.tied
    else:
        from peft import PeftModel

        below = transformers.AutoModelForCausalLM.from_pretrained(run.base, dtype=getattr(torch, run.dtype))
        model = PeftModel.from_pretrained(below, str(out)).eval()
    trained = run.trained()
    with torch.no_grad():
        ours, theirs = (each(input_ids=IDS, use_cache=False).logits.float() for each in (model, trained))
        assert torch.allclose(ours, theirs, atol=1e-4 if run.dtype == "float32" else 0.3)
    if run.dtype == "float32":
        assert greedy(model, IDS) == greedy(trained, IDS)
    assert len(check.rows) == 2 + (run.quantization == "nf4")
    assert json.loads((out / "check.json").read_text())["passed"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_it_was_trained(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight by weight, with an adapter on every linear layer; three of the families have a tied head here."""
    run = ExportRun(tmp_path, family, tied=family.startswith(("gemma", "qwen3"))).write()
    monkeypatch.setattr(merged, "load_model", lambda *arguments: pytest.fail("loaded"))
    export_run(Request(run.run, run.folder / "out", check=False))
    model, base = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run.folder / "out", run.base)
    )
    trained = run.trained()
    with torch.no_grad():
        ours, theirs, below = (each(input_ids=IDS, use_cache=False).logits for each in (model, trained, base))
    assert float((theirs - below).abs().max()) > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert greedy(model, IDS) == greedy(trained, IDS)


GGUF: dict[str, dict[str, Any]] = {
    "llama": {"quantization": "nf4"},
    "llama tied bfloat16": {"tied": True, "dtype": "bfloat16"},
    "qwen2": {"family": "qwen2", "shape": {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}},
    "gemma2": {"family": "gemma2", "tied": True, "targets": ATTENTION},
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf_goes_around(case: str, tmp_path: Path) -> None:
    run = ExportRun(tmp_path, **GGUF[case]).write()
    trained = run.trained()
    if run.family == "qwen2":
        assert any("q_proj.base_layer.bias" in name for name, _ in trained.named_parameters())
    out, check = exported(run, "gguf", gguf_type="f32")
    as_trained(run, check)
    [file] = out.glob("*.gguf")
    shape = transformers.AutoConfig.from_pretrained(run.base)
    arguments = {"gguf_file": file.name, "config": shape, "dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, **arguments).eval()
    if run.dtype == "float32":
        trained.base_model.model.set_attn_implementation("eager")
        assert greedy(model, IDS) == greedy(trained, IDS)
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f"FROM ./{file.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq' in text


def test_gguf_of_eight_bits_is_within_its_bound_and_not_exact(tmp_path: Path) -> None:
    run = ExportRun(tmp_path).write()
    out, check = exported(run, "gguf", gguf_type="q8_0")
    assert 1e-7 < check.rows[0].kl < 0.05
    assert check.rows[0].left is None
    [file] = out.glob("*.gguf")
    assert file.stat().st_size < next(run.base.glob("*.safetensors")).stat().st_size / 2
    model = load_model(ModelConfig(name=str(out), gguf_file=file.name, dtype="float32", device="cpu"))
    with torch.no_grad():
        ours, theirs = (each(input_ids=IDS, use_cache=False).logits for each in (model, run.trained()))
    assert 1e-4 < float((ours - theirs).abs().max()) < 1.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"family": "phi3"}, "family phi3 is not among those written here (llama, qwen2, gemma2)"),
    "rope": (
        {"shape": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "llama with rope_type=linear",
    ),
    "window": ({"family": "qwen2"}, "qwen2 with use_sliding_window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, named = REFUSED[case]
    run = ExportRun(tmp_path, **settings).write()
    assert main(["export", str(run.run), "--format", "gguf"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: gguf: ")
    assert named in err
    assert "convert_hf_to_gguf.py" in err
    assert err.count("\n") == 1
    assert not (run.run / "gguf").exists()


def test_weights_are_read_one_by_one_and_no_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ExportRun(tmp_path, own=True).write()
    monkeypatch.setattr(merged, "load_model", lambda *arguments: pytest.fail("loaded"))
    monkeypatch.setattr(merged, "SHARD_BYTES", 100_000)
    export_run(Request(run.run, run.folder / "out", check=False))
    shards = list((run.folder / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "out").eval()
    assert greedy(model, IDS) == greedy(run.trained(), IDS)


def test_what_is_being_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ExportRun(tmp_path).write()
    with only_writer(RunFolder(run.folder / "out"), "export"), pytest.raises(UserError, match="another export is"):
        export_run(Request(run.run, run.folder / "out"))
    monkeypatch.setattr(Path, "is_mount", lambda path: path == run.folder / "out")
    with pytest.raises(UserError, match=r"a file system is mounted here, .* name a folder in it"):
        export_run(Request(run.run, run.folder / "out"))
    assert not (run.folder / "out").exists()


FAULTS = {
    "a third of the adapter": (low_rank, "_scale", lambda settings, layer, rank: 2 / 3),
    "no adapter": (low_rank.LowRank, "added_to", lambda self, weight: weight),
    "rows in the other order": (gguf_file, "_reordered", lambda shape, name, weight: weight),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ExportRun(tmp_path).write()
    place, name, broken = FAULTS[fault]
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(CheckFailedError, match=r"not what was trained \(KL "):
        exported(run, "gguf")
    assert json.loads((run.folder / "gguf" / "check.json").read_text())["passed"] is False


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_the_check_sees_another_template_and_other_stops(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ExportRun(tmp_path).write()
    merged_writer, header_writer = export._write_merged, gguf_file._write_header

    def other_files(of: Any, target: Path) -> None:
        merged_writer(of, target)
        (target / "chat_template.jinja").write_text("{{ messages }}")
        (target / "generation_config.json").write_text('{"eos_token_id": 7}')

    def other_header(writer: Any, plan: Any) -> None:
        right = dict(plan.vocabulary.special)
        plan.vocabulary.special["eos"] = 7
        header_writer(writer, plan)
        plan.vocabulary.special.update(right)

    monkeypatch.setattr(export, "_write_merged", other_files)
    monkeypatch.setattr(gguf_file, "_write_header", other_header)
    assert main(["export", str(run.run), "--format", kind]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    if kind == "merged":
        assert "the chat template is another one" in err
        assert "generation's eos_token_id is 7" in err
    else:
        assert "tokenizer.ggml.eos_token_id is 7, and should be 2" in err


def test_rounding_that_undoes_the_adapter_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ExportRun(tmp_path).write()

    def coarse(name: str, double: bool) -> Any:
        return lambda weight, place: torch.zeros_like(weight)

    monkeypatch.setattr(check_export, "rounding_to", coarse)
    assert main(["export", str(run.run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run.run / 'merged'}\n"
    assert "note: rounded to nf4 leaves 0% of what the adapter does" in err
    assert "as written (float32)" in err
    card = (run.run / "merged" / "README.md").read_text(encoding="utf-8")
    assert "rounded to nf4" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("changed", "said"), [({"use_dora": True}, "use_dora"), ({"lora_alpha": 10**400}, "it cannot be read")]
)
def test_an_own_adapter_that_is_no_plain_lora_has_no_adapter_export(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    run = ExportRun(tmp_path, own=True).write()
    settings = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(settings | changed))
    with pytest.raises(UserError, match=rf"had this adapter before the run.*{said}.*use --format merged"):
        exported(run, "adapter")
