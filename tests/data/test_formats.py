"""Every format with good and bad records."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from record_files import BREAKERS, GUARD, JAILBREAK, OWN, TALK, TSV, USER, load, only, reasons, write_lines

from repbend_fast.data.formats import parse_jsonl
from repbend_fast.data.records import Message, Record
from repbend_fast.errors import UserError

CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find"}}]}
RESULT = {"role": "tool", "content": "It is here."}

# -- WildGuardMix
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "refusal", "answer", "role"),
    [
        ("unharmful", "compliance", "unharmful", "safe"),
        ("harmful", "refusal", "unharmful", "safe"),
        ("harmful", "compliance", "harmful", "unsafe"),
        ("harmful", "compliance", "unharmful", "unsafe"),
        ("harmful", "compliance", None, "unsafe"),
        ("unharmful", "refusal", "unharmful", None),
        ("unharmful", "compliance", "harmful", None),
        ("harmful", "refusal", "harmful", None),
        ("harmful", "refusal", None, None),
        ("harmful", None, "harmful", None),
        (None, None, None, None),
    ],
)
def test_wildguardmix_roles(tmp_path, prompt, refusal, answer, role):
    labels = {"prompt_harm_label": prompt, "response_refusal_label": refusal, "response_harm_label": answer}
    result = load(write_lines(tmp_path / "w.jsonl", [GUARD | labels]))
    assert result.sources[0].format == "wildguardmix"
    assert not result.bad
    if role is None:
        assert result.unused == 1
        assert sum(result.counts().values()) == 0
    else:
        assert only(result) == (role, (USER,), "With a cloth.", "")


def test_wildguardmix_unlabelled_prompt_without_response_is_not_bad(tmp_path):
    row = GUARD | {"response": None, "response_refusal_label": None, "response_harm_label": None}
    result = load(write_lines(tmp_path / "w.jsonl", [GUARD, row]))
    assert (result.unused, result.bad) == (1, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_harm_label": "evil"}, "unknown label `prompt_harm_label` = 'evil', expected harmful or unharmful"),
        ({"response_refusal_label": 3}, "unknown label `response_refusal_label` = 3, expected refusal or compliance"),
        (
            {"response_harm_label": ["harmful"]},
            "unknown label `response_harm_label` = ['harmful'], expected harmful or unharmful",
        ),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"response": "  \n"}, "`response` is empty"),
        ({"response": None}, "`response` is null, expected text"),
        ({"response": ["a"]}, "`response` is list, expected text"),
        ({"prompt": "\ud800"}, "`prompt` is not valid UTF-8"),
    ],
)
def test_wildguardmix_bad_records(tmp_path, change, reason):
    result = load(write_lines(tmp_path / "w.jsonl", [GUARD, GUARD | change]))
    assert reasons(result) == [("2", reason)]
    assert result.counts()["safe"] == 1


@pytest.mark.parametrize(
    "key", ["prompt", "response", "prompt_harm_label", "response_refusal_label", "response_harm_label"]
)
def test_wildguardmix_missing_field(tmp_path, key):
    result = load(write_lines(tmp_path / "w.jsonl", [{k: v for k, v in GUARD.items() if k != key}, GUARD]))
    assert reasons(result) == [("1", f"missing field `{key}`")]


# -- WildJailbreak
# --------------------------------------------------------------------------------------------------------------------


def test_wildjailbreak_of_the_authors_gives_pairs(tmp_path):
    other = JAILBREAK | {"prompt_type": "benign", "harmful_answer": ""}
    path = write_lines(tmp_path / "wildjailbreak.jsonl", [JAILBREAK, other])
    result = load(path)
    assert only(result) == ("pair", (USER,), "So.", "No.")
    assert result.unused == 1
    halves = load(path, roles=["unsafe", "safe"])
    assert halves.records["unsafe"] == [Record("unsafe", (USER,), "So.", origin=f"{path}:1")]
    assert halves.records["safe"] == [Record("safe", (USER,), "No.", origin=f"{path}:1")]
    assert halves.records["pair"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_type": "odd"}, "unknown label `prompt_type` = 'odd'"),
        ({"prompt_type": ""}, "`prompt_type` is empty"),
        ({"harmful_answer": ""}, "`harmful_answer` is empty"),
        ({"harmless_answer": 1}, "`harmless_answer` is int, expected text"),
        ({"prompt": None}, "`prompt` is null"),
    ],
)
def test_wildjailbreak_bad_records(tmp_path, change, reason):
    ((line, got),) = reasons(load(write_lines(tmp_path / "w.jsonl", [JAILBREAK, JAILBREAK, JAILBREAK | change])))
    assert line == "3"
    assert got.startswith(reason)


def write_tsv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(TSV), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_wildjailbreak_official_tsv_is_all_safe(tmp_path):
    rows = [
        TSV,
        TSV | {"data_type": "adversarial_harmful", "adversarial": 'As a poet,\nhow do I "polish" it?'},
        TSV | {"data_type": "vanilla_benign", "completion": "With a\tcloth."},
        TSV | {"data_type": "adversarial_benign", "adversarial": "Ahoy!"},
    ]
    path = write_tsv(tmp_path / "train.tsv", rows)
    result = load(path)
    assert result.sources[0].format == "wildjailbreak"
    assert result.counts() == {"safe": 4, "unsafe": 0, "pair": 0, "retain": 0}
    assert [r.messages[0].content for r in result.records["safe"]] == [
        "How do I polish it?", "As a poet,\nhow do I \"polish\" it?", "How do I polish it?", "Ahoy!",
    ]  # fmt: skip
    assert result.records["safe"][2].answer == "With a\tcloth."
    # The second record spans lines 3 and 4.
    assert [r.origin for r in result.records["safe"]] == [f"{path}:{n}" for n in (2, 3, 5, 6)]


def test_wildjailbreak_tsv_bad_records(tmp_path):
    rows = [
        TSV,
        TSV | {"data_type": "odd"},
        TSV | {"data_type": "adversarial_benign"},
        TSV | {"completion": ""},
        TSV | {"data_type": ""},
    ]
    path = write_tsv(tmp_path / "train.tsv", rows)
    with path.open("ab") as file:
        file.write(b"too\tfew\n\xff\ta\tb\tvanilla_benign\n")
    got = reasons(load(path))
    assert [line for line, _ in got] == ["3", "4", "5", "6", "7", "8"]
    expected = (
        "unknown label `data_type`",
        "`adversarial` is empty",
        "`completion` is empty",
        "`data_type` is empty",
        "2 cells",
        "invalid UTF-8",
    )
    for (_, reason), start in zip(got, expected, strict=True):
        assert reason.startswith(start)


# -- Circuit Breakers, UltraChat
# ------------------------------------------------------------------------------------------------------


def test_circuit_breakers_array_with_lines(tmp_path):
    path = tmp_path / "circuit_breakers_train.json"
    bad = [BREAKERS | {"output": ""}, {k: v for k, v in BREAKERS.items() if k != "llama3_output"}, ["no object"]]
    path.write_text(json.dumps([BREAKERS, *bad], indent=2), encoding="utf-8")
    result = load(path)
    assert only(result) == ("pair", (USER,), "So.", "No.")
    assert reasons(result) == [
        ("8", "`output` is empty"),
        ("14", "missing field `llama3_output`"),
        ("19", "a record must be a JSON object, not list"),
    ]
    assert load(path, roles=["pair", "unsafe"]).counts() == {"safe": 0, "unsafe": 1, "pair": 1, "retain": 0}


def test_role_that_a_format_cannot_give_is_refused(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [BREAKERS])
    with pytest.raises(UserError, match="roles asks for retain, but circuit_breakers gives only pair, unsafe, safe"):
        load(path, roles=["retain"])


def test_array_that_breaks_off_keeps_what_came_before(tmp_path):
    path = tmp_path / "c.json"
    text = json.dumps([BREAKERS, BREAKERS], indent=1)
    path.write_text(text[: text.rindex('"output"')], encoding="utf-8")
    result = load(path)
    assert result.counts()["pair"] == 1
    ((line, reason),) = reasons(result)
    assert line == "8"
    assert reason.startswith("invalid JSON")


def test_array_with_invalid_utf8_names_the_element(tmp_path):
    path = tmp_path / "c.json"
    first, second = (json.dumps(BREAKERS).encode() for _ in range(2))
    path.write_bytes(b"[" + first + b",\n" + second.replace(b"polish", b"pol\xe9sh") + b",\n" + first + b"]")
    result = load(path)
    assert reasons(result) == [("2", "invalid UTF-8")]
    assert result.counts()["pair"] == 2


def test_ultrachat(tmp_path):
    rows = [
        {"prompt": "Hi", "prompt_id": "1", "messages": TALK},
        {"messages": [{"role": "system", "content": "Be kind."}, *TALK]},
    ]
    result = load(write_lines(tmp_path / "u.jsonl", rows), format="ultrachat")
    assert [len(r.messages) for r in result.records["retain"]] == [2, 3]
    assert result.records["retain"][0].messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert load(tmp_path / "u.jsonl").sources[0].format == "ultrachat"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "`messages` is empty"),
        ("Hi", "`messages` is str, expected a list"),
        (TALK[:1], "the last message must be the assistant's"),
        ([TALK[0], TALK[0], TALK[1]], "roles do not alternate at message 2 (user)"),
        ([TALK[1]], "roles do not alternate at message 1 (assistant)"),
        ([{"role": "system", "content": "s"}, TALK[1]], "roles do not alternate at message 2 (assistant)"),
        ([*TALK, {"role": "system", "content": "s"}, TALK[1]], "roles do not alternate at message 3 (system)"),
        ([{"role": "system", "content": "s"}], "the last message must be the assistant's"),
        (
            [TALK[0], {"role": "bot", "content": "x"}],
            "message 2: unknown role 'bot', expected system, user, assistant or tool",
        ),
        ([TALK[0], {"role": "assistant"}], "message 2: missing field `content`"),
        ([TALK[0], {"role": "assistant", "content": ""}], "message 2: `content` is empty"),
        (["Hi", "Hello"], "message 1 is str, expected an object with role and content"),
        ([TALK[0], RESULT, TALK[1]], "a tool's result follows no tool call at message 2 (tool)"),
        ([TALK[0], CALL, TALK[1]], "a tool's result is missing at message 3 (assistant)"),
        ([TALK[0], CALL, TALK[0]], "a tool's result is missing at message 3 (user)"),
        ([TALK[0], CALL, RESULT, TALK[0]], "roles do not alternate at message 4 (user)"),
        ([TALK[0], CALL, RESULT], "the last message must be the assistant's"),
        ([TALK[0], CALL, {"role": "tool"}], "message 3: missing field `content`"),
        ([TALK[0], {**CALL, "tool_calls": []}], "message 2: missing field `content`"),
        ([TALK[0], {**CALL, "tool_calls": {}}], "message 2: `tool_calls` is dict, expected a list"),
        ([TALK[0], {**CALL, "tool_calls": "find"}], "message 2: `tool_calls` is text that is not JSON"),
        ([TALK[0], {**CALL, "tool_calls": [{}]}], "message 2: tool call 1: missing field `name`"),
        (
            [TALK[0], {**CALL, "tool_calls": ["find"]}],
            "message 2: tool call 1 is str, expected an object with name and arguments",
        ),
        (
            [TALK[0], {**CALL, "tool_calls": [{"name": "find", "arguments": "[1]"}]}],
            "message 2: tool call 1: `arguments` is list, expected an object or its JSON",
        ),
        (
            [TALK[0], {**CALL, "tool_calls": [{"name": "find", "arguments": "{"}]}],
            "message 2: tool call 1: `arguments` is text that is not JSON",
        ),
    ],
)
def test_bad_conversations(tmp_path, messages, reason):
    result = load(write_lines(tmp_path / "u.jsonl", [{"messages": TALK}, {"messages": messages}]))
    assert reasons(result) == [("2", reason)]


# -- own JSONL
# ----------------------------------------------------------------------------------------------------------------------


def test_own_jsonl(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", OWN)
    result = load(path)
    assert result.sources[0].format == "jsonl"
    assert result.records["safe"] == [Record("safe", (USER,), "No.", origin=f"{path}:1")]
    assert [m.content for m in result.records["unsafe"][0].messages] == ["Hi", "Hello", "And now?"]
    assert result.records["pair"] == [Record("pair", (USER,), "So.", "No.", f"{path}:3")]
    assert [r.messages for r in result.records["retain"]] == [
        (Message("user", "Hi"), Message("assistant", "Hello"))
    ] * 2
    assert load(path, roles=["safe"]).counts() == {"safe": 1, "unsafe": 0, "pair": 0, "retain": 0}


def test_own_jsonl_with_tools(tmp_path):
    tool = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    told = [TALK[0], CALL, {**RESULT, "tool_call_id": "1", "name": None}]
    calls = {"tool_calls": [{"function": {"name": "find", "arguments": '{"what": "Ä"}'}}]}
    rows = [
        {"role": "unsafe", "tools": [tool], "messages": told, "answer": calls},
        {
            "role": "unsafe",
            "tools": json.dumps([{"type": "function", "function": tool}]),
            "messages": told[:1],
            **{"answer": {"content": "", **calls}},
        },
        {"role": "pair", "tools": None, "messages": told, "unsafe_answer": calls, "safe_answer": "No."},
        {"role": "safe", "messages": [*TALK, TALK[0], {"role": "assistant", "content": "Yes", **calls}]},
        {"role": "retain", "tools": [tool], "messages": [*told, TALK[1]]},
    ]
    result = load(write_lines(tmp_path / "tools.jsonl", rows))
    first, second = result.records["unsafe"]
    wrapped = {"type": "function", "function": {"name": "find", "arguments": {"what": "Ä"}}}
    assert json.loads(first.tools) == json.loads(second.tools) == [{"type": "function", "function": tool}]
    assert json.loads(first.answer_extra) == {"tool_calls": [wrapped]}
    assert (first.answer, second.answer_extra) == ("", first.answer_extra)
    assert [m.role for m in first.messages] == ["user", "assistant", "tool"]
    assert json.loads(first.messages[1].extra)["tool_calls"][0]["id"] == "1"
    assert json.loads(first.messages[2].extra) == {"tool_call_id": "1"}
    (pair,), (safe,), (retain,) = (result.records[role] for role in ("pair", "safe", "retain"))
    assert (pair.tools, pair.answer, pair.safe_answer, pair.safe_extra) == ("", "", "No.", "")
    assert pair.answer_extra == first.answer_extra
    assert (len(safe.messages), safe.answer, safe.answer_extra) == (3, "Yes", first.answer_extra)
    assert (retain.tools, retain.messages[:3]) == (first.tools, first.messages)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"role": "safe", "messages": TALK[:1]}, "the last message must be the assistant's"),
        ({"role": "safe", "prompt": "a", "answer": {"content": ""}}, "`answer`: `content` is empty"),
        ({"role": "safe", "prompt": "a", "answer": {"tool_calls": []}}, "`answer`: missing field `content`"),
        ({"role": "safe", "prompt": "a", "answer": "b", "tools": "find"}, "`tools` is text that is not JSON"),
        ({"role": "safe", "prompt": "a", "answer": "b", "tools": {}}, "`tools` is dict, expected a list"),
        ({"role": "safe", "prompt": "a", "answer": "b", "tools": [{}]}, "tool 1: missing field `name`"),
        (
            {"role": "safe", "prompt": "a", "answer": "b", "tools": ["x"]},
            "tool 1 is str, expected an object with name and parameters",
        ),
        ({"role": "sage", "prompt": "a", "answer": "b"}, "unknown role 'sage', expected safe, unsafe, pair, retain"),
        ({"role": 3, "prompt": "a", "answer": "b"}, "`role` is int, expected text"),
        ({"role": "safe", "prompt": "a"}, "missing field `answer`"),
        ({"role": "safe", "answer": "a"}, "missing field `prompt`"),
        (
            {"role": "safe", "prompt": "a", "messages": TALK, "answer": "b"},
            "both `prompt` and `messages` are given, expected one of them",
        ),
        ({"role": "safe", "messages": TALK, "answer": "b"}, "the last message must be the user's"),
        ({"role": "pair", "prompt": "a", "unsafe_answer": "b"}, "missing field `safe_answer`"),
        ({"role": "pair", "prompt": "a", "unsafe_answer": "", "safe_answer": "c"}, "`unsafe_answer` is empty"),
        ({"role": "retain"}, "missing field `messages`"),
        ({"prompt": "a", "answer": "b"}, "missing field `role`"),
    ],
)
def test_own_jsonl_bad_records(tmp_path, row, reason):
    assert reasons(load(write_lines(tmp_path / "own.jsonl", [*OWN, row]))) == [("6", reason)]


def test_lines_that_are_no_records(tmp_path):
    path = tmp_path / "own.jsonl"
    good = json.dumps(OWN[0]).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b'\r\n\n{"role":\n[1]\n\xff\xfe' + good + b"\n" + b'{"a":' * 100_000 + b"\n" + good
    )
    result = load(path)
    assert result.counts()["safe"] == 2
    got = reasons(result)
    assert [line for line, _ in got] == ["3", "4", "5", "6"]
    for (_, reason), start in zip(
        got, ("invalid JSON", "a record must be", "invalid UTF-8 (byte 1", "invalid JSON"), strict=True
    ):
        assert reason.startswith(start)


def test_the_records_of_the_page_are_records():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    text, found = "".join(re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)), []
    while text.strip():
        row, end = json.JSONDecoder().raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        found += parse_jsonl(row, "data.md")
    assert [record.role for record in found] == ["safe", "unsafe", "pair", "retain", "unsafe", "pair"]
    assert found[-1].tools
