"""Kinds of files, the hub, bad records over all sources, and limits."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from record_files import GUARD, OWN, TALK, TSV, USER, load, reasons, write_lines

from repbend_fast.data.records import Message, Record
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.data.sources import load_records
from repbend_fast.errors import UserError

# -- kinds of files
# -------------------------------------------------------------------------------------------------------------------


def test_the_same_records_from_every_kind_of_file(tmp_path):
    rows = [GUARD | {"prompt": f'Question {i}, "really"?\nYes.'} for i in range(5)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as packed:
        packed.write(text)
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(GUARD), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    loaded = {}
    for path in sorted(tmp_path.iterdir()):
        result = load(path, skip=False)
        loaded[path.name] = [(r.role, r.messages, r.answer) for r in result.records["safe"]]
    assert len(loaded) == 7
    assert len(loaded["a.jsonl"]) == 5
    for name, records in loaded.items():
        assert records == loaded["a.jsonl"], name


def test_parquet_conversations_and_rows(tmp_path):
    path = tmp_path / "train_sft.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TALK}, {"messages": []}]), path)
    result = load(path)
    assert result.counts()["retain"] == 1
    assert reasons(result) == [("2", "`messages` is empty")]


def test_csv_with_an_open_quote(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text(
        ",".join(GUARD) + "\n" + ",".join(map(str, GUARD.values())) + '\n"never closed,' + "\n", encoding="utf-8"
    )
    result = load(path)
    assert result.counts()["safe"] == 1
    ((line, reason),) = reasons(result)
    assert (line, reason[:15]) == ("3", "invalid quoting")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="holds no records"):
        load(tmp_path / name)


def test_empty_array(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    with pytest.raises(UserError, match="holds no records"):
        load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"hello", "unknown kind of file"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.jsonl.gz", b"not packed", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(json.dumps(OWN[0]).encode() + b"\n")[:-12], "cannot be read"),
        (
            "a.jsonl",
            b'{"question": "x", "reply": "y"}\n',
            "format not recognised from the fields question, reply; set format to one of jsonl",
        ),
        ("a.jsonl", b"{}\n", "format not recognised from the fields \\(none\\)"),
    ],
    ids=["suffix", "parquet", "not-gzip", "gzip-cut-short", "unknown-fields", "no-fields"],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("\ufeff" + ",".join(GUARD) + "\n" + ",".join(map(str, GUARD.values())) + "\n", encoding="utf-8")
    assert load(path, skip=False).counts()["safe"] == 1


def test_split_of_a_file_is_refused(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", OWN)
    with pytest.raises(UserError, match="split and subset belong to hub data sets"):
        load(path, split="train")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        load(tmp_path / "nothing.jsonl")


# -- hub
# ----------------------------------------------------------------------------------------------------------------------


def test_hub_data_set_is_loaded_with_what_it_needs(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, *, split, **options):
        calls.append((name, subset, split, options))
        return [TSV, TSV | {"completion": None}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = load("allenai/wildjailbreak")
    assert calls == [("allenai/wildjailbreak", "train", "train", {"delimiter": "\t", "keep_default_na": False})]
    assert result.records["safe"][0].origin == "allenai/wildjailbreak:1"
    assert reasons(result) == [("2", "`completion` is null, expected text")]
    load("someone/else", subset="s", split="part")
    assert calls[1] == ("someone/else", "s", "part", {})


def test_local_folder_goes_through_the_data_set_library(tmp_path):
    folder = tmp_path / "ultra"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"messages": TALK}])
    assert load(folder).counts()["retain"] == 1


def test_hub_failure_is_one_line_with_the_remedy(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b'\non the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"^data set a/b: cannot be loaded .*OfflineModeIsEnabled.* local file"
    ) as caught:
        load("a/b")
    assert "\n" not in str(caught.value)


# -- stopping, limits
# -----------------------------------------------------------------------------------------------------------------


def test_bad_records_stop_the_run_with_one_line(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", [OWN[0], {"role": "safe", "prompt": "a"}, OWN[1], {"role": "odd"}])
    with pytest.raises(UserError) as caught:
        load(path, skip=False)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: missing field `answer` (2 bad records in the data)")
    assert "data.skip_bad_records=true" in message
    assert "repbend-fast data check" in message
    assert "\n" not in message
    assert f"skipped 2 bad records, the first at {path}:2" in load(path).summary()


def many(path, start, count):
    return write_lines(
        path, [{"role": "safe", "prompt": f"question {i}", "answer": "No."} for i in range(start, start + count)]
    )


def chosen(sources, seed=1, limit=None):
    result = load_records(DataConfig(sources=sources, limit=limit), seed=seed, skip_bad_records=False)
    return [r.messages[0].content for r in result.records["safe"]]


def test_limit_is_chosen_by_seed_whatever_else_is_loaded(tmp_path):
    a, b = many(tmp_path / "a.jsonl", 0, 500), many(tmp_path / "b.jsonl", 1000, 300)
    limited = SourceConfig(path=str(a), limit=7)
    alone = chosen([limited])
    assert len(alone) == 7
    assert alone != [f"question {i}" for i in range(7)]
    assert [q for q in chosen([SourceConfig(path=str(b)), limited]) if q in set(alone)] == alone
    assert chosen([limited]) == alone
    assert chosen([limited], seed=2) != alone
    counts = load_records([limited], seed=1, skip_bad_records=False).sources[0]
    assert (counts.found["safe"], counts.taken["safe"]) == (500, 7)


def test_limit_over_all_sources_does_not_depend_on_their_order(tmp_path):
    sources = [SourceConfig(path=str(many(tmp_path / f"{i}.jsonl", 1000 * i, 200))) for i in range(3)]
    forward = chosen(sources, limit=30)
    assert len(forward) == 30
    assert set(chosen(sources[::-1], limit=30)) == set(forward)
    assert len({q[:10] for q in forward}) > 1


def test_demo_records_come_from_the_bundled_data(monkeypatch):
    import repbend_fast.data.demo

    asked = []

    def training_records(split):
        asked.append(split)
        return [
            Record("safe", (USER,), "No.", origin="demo:1"),
            Record("retain", (USER, Message("assistant", "Hello")), origin="demo:2"),
        ]

    monkeypatch.setattr(repbend_fast.data.demo, "training_records", training_records, raising=False)
    assert load("demo").counts() == {"safe": 1, "unsafe": 0, "pair": 0, "retain": 1}
    assert load("demo", split="validation", roles=["safe"]).unused == 1
    assert asked == ["train", "validation"]


@pytest.mark.parametrize(
    ("there", "asked", "hint"),
    [
        ("my_data.jsonl", "my_data.jsnl", "; did you mean {}my_data.jsonl?"),
        ("my_data.jsonl", "mydata.jsonl", "; did you mean {}my_data.jsonl?"),
        ("x.jsonl", "data.json", ""),
        ("sub/train.csv", "sub/trian.csv", "; did you mean {}sub/train.csv?"),
        ("talk.jsonl", "talk.josn", "; did you mean {}talk.jsonl?"),
    ],
)
def test_a_mistyped_file_is_no_hub_name(tmp_path, monkeypatch, there, asked, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("repbend_fast.data.reading._hub_rows", lambda source: pytest.fail("the hub was asked"))
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    with pytest.raises(UserError) as caught:
        load_records([SourceConfig(path=asked)], seed=1, skip_bad_records=False)
    message = str(caught.value)
    assert message.startswith(f"{asked}: no such file; ")
    assert message.endswith(hint.format("") or "or `demo`")


@pytest.mark.parametrize("name", ["squad", "org/data-v1.5", "HuggingFaceH4/ultrachat_200k", "org/wiki.en"])
def test_hub_names_go_to_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("repbend_fast.data.reading._hub_rows", lambda source: asked.append(source.path) or iter(()))
    with pytest.raises(UserError, match="holds no records"):
        load_records([SourceConfig(path=name)], seed=1, skip_bad_records=False)
    assert asked == [name]


def test_a_name_that_the_hub_does_not_know_gets_the_nearest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training.jsonl").touch()
    with pytest.raises(UserError, match=r"cannot be loaded through the hub.*; did you mean training\.jsonl\?$"):
        load_records([SourceConfig(path="training")], seed=1, skip_bad_records=False)
