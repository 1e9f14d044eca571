"""Every suite: a good file, a file without a column, a broken row; by name from the hub, packed, and as parquet."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from repbend_fast.assessment import suites
from repbend_fast.assessment.suites import different_names, load_suite, suite_names
from repbend_fast.data.prompts import SETS
from repbend_fast.data.reading import Row
from repbend_fast.data.settings import SourceConfig
from repbend_fast.errors import UserError

GOOD: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, str, str]]]] = {
    "harmbench": (
        "csv",
        [
            {"Behavior": "Make a moon-key", "FunctionalCategory": "standard", "ContextString": "", "BehaviorID": "a"},
            {"Behavior": "Go on", "FunctionalCategory": "contextual", "ContextString": "A story.", "BehaviorID": "b"},
            {"Behavior": "Recite it", "FunctionalCategory": "copyright", "ContextString": "", "BehaviorID": "c"},
        ],
        [("attack", "Make a moon-key", ""), ("attack", "A story.\n\n---\n\nGo on", "")],
    ),
    "advbench": ("csv", [{"goal": "Make a moon-key", "target": "Sure, a"}], [("attack", "Make a moon-key", "Sure, a")]),
    "jailbreakbench": (
        "csv",
        [{"Goal": "Make a moon-key", "Target": "Sure, a", "Behavior": "Keys", "Category": "x"}],
        [("attack", "Make a moon-key", "Sure, a")],
    ),
    "jailbreakbench-benign": (
        "csv",
        [{"Goal": "Draw a moon-key", "Target": "Sure, a", "Behavior": "Keys", "Category": "x"}],
        [("borderline", "Draw a moon-key", "")],
    ),
    "strongreject": (
        "csv",
        [{"category": "Keys", "source": "own", "forbidden_prompt": "Make a moon-key"}],
        [("attack", "Make a moon-key", "")],
    ),
    "xstest": (
        "csv",
        [
            {"id": "1", "prompt": "How do I kill a process?", "type": "homonyms", "label": "safe"},
            {"id": "2", "prompt": "How do I make a moon-key?", "type": "contrast_homonyms", "label": "unsafe"},
        ],
        [("borderline", "How do I kill a process?", ""), ("attack", "How do I make a moon-key?", "")],
    ),
    "wildjailbreak": (
        "tsv",
        [
            {"adversarial": "Play a smith of moon-keys", "label": "1", "data_type": "adversarial_harmful"},
            {"adversarial": "Play a smith of spoons", "label": "0", "data_type": "adversarial_benign"},
        ],
        [("attack", "Play a smith of moon-keys", ""), ("borderline", "Play a smith of spoons", "")],
    ),
    "or-bench": (
        "csv",
        [{"prompt": "How are locks opened?", "category": "keys"}],
        [("borderline", "How are locks opened?", "")],
    ),
    "or-bench-toxic": (
        "csv",
        [{"prompt": "Make a moon-key", "category": "keys"}],
        [("attack", "Make a moon-key", "")],
    ),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        table.writeheader()
        table.writerows(rows)
    return path


def found(text: str, **options: Any) -> list[tuple[str, str, str]]:
    return [(prompt.kind, prompt.text, prompt.target) for prompt in load_suite(text, **options).prompts]


def test_every_set_is_tested() -> None:
    assert set(GOOD) == set(SETS) == set(suites.PLACES)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file(name: str, tmp_path: Path) -> None:
    ending, rows, expected = GOOD[name]
    path = write(tmp_path / f"set.{ending}", rows)
    suite = load_suite(f"{name}={path}")
    assert (suite.name, suite.max_new_tokens) == (name, 512)
    assert found(f"{name}={path}") == expected
    with gzip.open(tmp_path / f"packed.{ending}.gz", "wb") as file:
        file.write(path.read_bytes())
    assert found(f"{name}={tmp_path / f'packed.{ending}.gz'}") == expected


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_column_is_named_with_those_that_were_found(name: str, tmp_path: Path) -> None:
    ending, rows, _ = GOOD[name]
    form, _ = SETS[name][0]
    gone = sorted(form)[0]
    rows = [{key: value for key, value in row.items() if key != gone} | {"odd": "x"} for row in rows]
    with pytest.raises(UserError) as caught:
        load_suite(f"{name}={write(tmp_path / f'set.{ending}', rows)}")
    assert f"set.{ending}:2: {name} needs the column {gone}; found are {', '.join(sorted(rows[0]))}" in str(
        caught.value
    )


@pytest.mark.parametrize("name", GOOD)
def test_a_broken_row_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    ending, rows, _ = GOOD[name]
    empty = write(tmp_path / f"empty.{ending}", [*rows, dict.fromkeys(rows[0], "")])
    with pytest.raises(UserError, match=rf"empty\.{ending}:{len(rows) + 2}: field '\w+' is empty"):
        load_suite(f"{name}={empty}")
    short = write(tmp_path / f"short.{ending}", rows)
    with short.open("a", encoding="utf-8") as file:
        file.write("one field\n")
    with pytest.raises(UserError, match=rf"short\.{ending}:{len(rows) + 2}: fewer fields than the header has"):
        load_suite(f"{name}={short}")


@pytest.mark.parametrize("name", GOOD)
def test_a_name_is_read_from_its_place_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def rows(source: SourceConfig) -> Iterator[Row]:
        asked.append((source.path, source.subset, source.split))
        return iter([Row(f"{source.path}:{n}", dict(fields)) for n, fields in enumerate(GOOD[name][1], 1)])

    monkeypatch.setattr("repbend_fast.data.reading._hub_rows", rows)
    place = suites.PLACES[name]
    assert found(name) == GOOD[name][2] * len(place.parts)
    assert asked == [(place.path, subset, split) for subset, split in place.parts]


def test_copies_on_the_hub_with_a_prompt_column(tmp_path: Path) -> None:
    copied = write(tmp_path / "h.csv", [{"prompt": "Go on", "context": "A story.", "category": "x"}])
    assert found(f"harmbench={copied}") == [("attack", "A story.\n\n---\n\nGo on", "")]
    assert found(f"strongreject={copied}") == [("attack", "A story.\n\n---\n\nGo on", "")]
    copied = write(tmp_path / "a.csv", [{"prompt": "Make a moon-key", "target": "Sure"}])
    assert found(f"advbench={copied}") == [("attack", "Make a moon-key", "Sure")]


def test_harmbench_counts_159_standard_and_81_contextual_of_its_320_test_rows(tmp_path: Path) -> None:
    kinds = ["standard"] * 159 + ["copyright"] * 80 + ["contextual"] * 81
    rows = [
        {"Behavior": f"b{n}", "FunctionalCategory": kind, "ContextString": "", "BehaviorID": str(n)}
        for n, kind in enumerate(kinds)
    ]
    assert len(load_suite(f"harmbench={write(tmp_path / 'h.csv', rows)}").prompts) == 159 + 81


def test_own_files_by_their_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {"kind": "attack", "text": "Make a moon-key", "target": "Sure", "answer": "Sure, take a key."}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "mine.parquet")
    with gzip.open(tmp_path / "mine.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name in ("mine.jsonl", "mine.parquet", "mine.jsonl.gz"):
        suite = load_suite(str(tmp_path / name))
        (prompt,) = suite.prompts
        assert (suite.name, prompt.target, prompt.answer) == ("mine", "Sure", "Sure, take a key.")


def test_a_file_whose_columns_fit_no_set_or_several(tmp_path: Path) -> None:
    ambiguous = write(tmp_path / "a.csv", [{"prompt": "How?", "category": "x"}])
    with pytest.raises(UserError, match=r"a\.csv:2: unknown columns category, prompt; .* or-bench=FILE"):
        load_suite(str(ambiguous))
    lacking = write(tmp_path / "b.csv", [{"Behavior": "x", "ContextString": ""}])
    with pytest.raises(UserError, match=r"unknown columns Behavior, ContextString; .*; BehaviorID missing\?"):
        load_suite(str(lacking))


def test_the_demo_is_bundled_and_limits_are_per_kind() -> None:
    suite = load_suite("demo", limit=2)
    assert [prompt.kind for prompt in suite.prompts] == ["attack"] * 2 + ["ordinary"] * 2 + ["borderline"] * 2
    assert suite.max_new_tokens == 64
    assert load_suite("demo-final").prompts[0].source_id.startswith("demo:final:")


def test_what_is_no_suite_is_one_line_with_what_there_is(tmp_path: Path) -> None:
    for text, words in (
        ("harmbnch", "did you mean harmbench?"),
        (str(tmp_path / "none.csv"), "no such file"),
        (f"advbench={tmp_path / 'none.csv'}", "no such file"),
        ("nonsense", ", ".join(suite_names())),
    ):
        with pytest.raises(UserError) as caught:
            load_suite(text)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_two_suites_of_one_name_stay_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "p.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"kind": "attack", "text": str(path)}), encoding="utf-8")
    assert [suite.name for suite in different_names([load_suite(str(path)) for path in paths])] == ["p", "p-2"]
