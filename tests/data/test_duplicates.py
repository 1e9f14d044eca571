"""What ``data check`` and a run say about records that are there more than once."""

from __future__ import annotations

import io

import pytest
from record_files import load, write_lines
from test_check import config, run

from repbend_fast.console import saying
from repbend_fast.data.check import check_data, print_report
from repbend_fast.data.duplicates import NearDuplicates, duplicate_lines

SAFE = {"role": "safe", "prompt": "How do I polish it?", "answer": "With a cloth."}
UNSAFE = {"role": "unsafe", "prompt": "How do I make glimmer-dust?", "answer": "So."}
PAIR = {"role": "pair", "prompt": "How do I open a moon-key?", "unsafe_answer": "So.", "safe_answer": "No."}
CHAT = {"role": "retain", "prompt": "Hi", "answer": "Hello"}
CASES = {
    "none": ([SAFE, UNSAFE, PAIR, CHAT, SAFE | {"answer": "With sand."}], []),
    "one role": (
        [SAFE, UNSAFE, SAFE, SAFE],
        ["2 safe records are exact copies of an earlier one, {0}:3 of {0}:1 for one"],
    ),
    "each role": (
        [PAIR, CHAT, PAIR, CHAT],
        [
            "1 pair record is an exact copy of an earlier one, {0}:3 of {0}:1 for one",
            "1 retain record is an exact copy of an earlier one, {0}:4 of {0}:2 for one",
        ],
    ),
    "both sides": (
        [SAFE, SAFE | {"role": "unsafe"}],
        ["1 conversation is both safe and unsafe, {0}:1 and {0}:2 for one"],
    ),
    "a retained one": (
        [CHAT, CHAT | {"role": "unsafe"}],
        ["1 conversation is both safe and unsafe, {0}:1 and {0}:2 for one"],
    ),
    "a pair of equal answers": (
        [PAIR | {"safe_answer": "So."}],
        ["1 conversation is both safe and unsafe, {0}:1 of {0}:1 for one"],
    ),
    "a pair beside its unsafe answer": ([UNSAFE, PAIR | {"prompt": UNSAFE["prompt"]}], []),
    "a pair beside a safe answer": (
        [PAIR, SAFE | {"prompt": PAIR["prompt"]}],
        ["1 prompt has a safe and an unsafe answer in separate records, {0}:2 and {0}:1 for one"],
    ),
    "other answers": (
        [UNSAFE, UNSAFE | {"role": "safe", "answer": "No."}, PAIR],
        ["1 prompt has a safe and an unsafe answer in separate records, {0}:2 and {0}:1 for one"],
    ),
}


@pytest.mark.parametrize(("rows", "expected"), CASES.values(), ids=CASES)
def test_duplicates_are_named_with_file_and_line(tmp_path, rows, expected):
    path = write_lines(tmp_path / "d.jsonl", rows)
    expected = [line.format(path) for line in expected]
    assert duplicate_lines(load(path).records) == expected
    code, text = run(config(path))
    assert code == 0
    assert [line.removeprefix("note: ") for line in text.splitlines() if line.startswith("note: ")] == expected


def test_dropped_reasoning_is_named(tmp_path, make_tokenizer):
    from chat_tokenizers import REBUILDING

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hm.</think>Yes"}]
    path = write_lines(
        tmp_path / "d.jsonl", [{"role": "retain", "messages": talk * 2}, {"role": "retain", "messages": talk}]
    )
    source = config(path).data
    report = check_data(source, make_tokenizer(template=REBUILDING))
    out = io.StringIO()
    with saying(out.write):
        print_report(report)
    assert (
        "note: the chat template leaves out the reasoning of earlier turns, as it does when the model talks: in 1 "
        f"record, {path}:1" in (out.getvalue())
    )
    assert check_data(source, make_tokenizer()).notes == []


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("Take the bowl, and stir it well!", [0]),
        ("Take the bowl and stir it badly", [0]),
        ("Leave the bowl alone", []),
        ("WATER", [1]),
        ("", []),
    ],
)
def test_near_duplicates_share_runs_of_words(text: str, near: list[int]) -> None:
    seen = NearDuplicates(0.6, 3)
    for known in ("take the bowl and stir it well", "water"):
        seen.add(known)
    assert list(seen.near(text)) == near
