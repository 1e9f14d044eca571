"""The data check: counts, lengths, truncation, bad records, exit code."""

from __future__ import annotations

import io
import json

import chat_tokenizers
import pytest
from chat_tokenizers import INST
from record_files import OWN, TALK, write_lines

from repbend_fast.config.schema import Config, ModelConfig
from repbend_fast.console import saying
from repbend_fast.data.check import check_data, histogram, percentile, print_report
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.runs.check_data import run_check


def config(path, **data):
    return Config(model=ModelConfig(name="none"), data=DataConfig(sources=[SourceConfig(path=str(path))], **data))


def run(settings, tokenizer=None):
    said = []
    with saying(said.append):
        code = run_check(settings, tokenizer)
    return code, "\n".join(said)


def test_percentile_is_the_nearest_rank():
    values = list(range(1, 101))
    assert [percentile(values, p) for p in (5, 50, 99, 100)] == [5, 50, 99, 100]
    assert percentile([7], 5) == 7


def test_histogram_counts_every_value_once():
    assert histogram([1, 15, 16, 31, 130]) == [(1, 15, 2), (16, 31, 2), (32, 63, 0), (64, 127, 0), (128, 255, 1)]
    assert histogram([]) == []


def test_good_data_exits_with_zero(tmp_path):
    code, text = run(config(write_lines(tmp_path / "own.jsonl", OWN)))
    assert code == 0
    assert "no bad records" in text
    assert "lengths in characters" in text


def test_bad_data_exits_with_two_and_lists_the_first_twenty(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", OWN + [{"role": "safe", "prompt": f"q {i}"} for i in range(25)])
    code, text = run(config(path))
    assert code == 2
    assert "25 bad records, the first 20:" in text
    assert f"{path}:6: missing field `answer`" in text
    assert f"{path}:25: missing" in text
    assert f"{path}:26: missing" not in text
    assert run(config(path, skip_bad_records=True))[0] == 0


def test_lengths_and_truncation_in_tokens(tmp_path, make_tokenizer):
    rows = [
        {"role": "safe", "prompt": "fox " * 100, "answer": "No."},
        {"role": "safe", "prompt": "fox", "answer": "No. " * 100},
        {"role": "pair", "prompt": "fox", "unsafe_answer": "Sure.", "safe_answer": "No. " * 100},
        {"role": "retain", "prompt": "fox", "answer": "dog " * 200},
        {"role": "retain", "prompt": "fox", "answer": "dog"},
    ]
    data = DataConfig(
        sources=[SourceConfig(path=str(write_lines(tmp_path / "own.jsonl", rows)))],
        max_prompt_tokens=50,
        max_answer_tokens=30,
    )
    tokenizer = make_tokenizer()
    report = check_data(data, tokenizer)
    safe, pair, retain = (report.lengths[r] for r in ("safe", "pair", "retain"))
    assert (safe.cut_prompts, safe.cut_answers, pair.cut_prompts, pair.cut_answers, retain.cut_whole) == (1, 1, 0, 1, 1)
    encoder = ChatEncoder(tokenizer, 10_000, 10_000)
    assert safe.whole == [len(encoder.encode(r)) for r in report.records.records["safe"]]
    assert pair.whole == [len(encoder.encode(r).safe) for r in report.records.records["pair"]]
    assert retain.whole == [len(encoder.encode(r)) for r in report.records.records["retain"]]
    out = io.StringIO()
    with saying(out.write):
        print_report(report)
    assert "lengths in tokens" in out.getvalue()
    assert "truncated" in out.getvalue()


def test_counts_show_limits_and_sources(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [{"role": "safe", "prompt": f"q {i}", "answer": "No."} for i in range(9)])
    b = write_lines(tmp_path / "b.jsonl", OWN)
    report = check_data([SourceConfig(path=str(a), limit=4), SourceConfig(path=str(b), roles=["retain"])], None)
    assert report.records.counts() == {"safe": 4, "unsafe": 0, "pair": 0, "retain": 2}
    out = io.StringIO()
    with saying(out.write):
        print_report(report)
    assert "4/9" in out.getvalue()
    assert report.records.unused == 3


def test_record_that_the_template_refuses_is_bad(tmp_path, make_tokenizer):
    row = {
        "role": "safe",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "answer": "No.",
    }
    path = write_lines(tmp_path / "own.jsonl", [*OWN, row])
    code, text = run(config(path), make_tokenizer(template=INST))
    assert code == 2
    assert f"{path}:6: the chat template of" in text


def test_markup_in_bad_data_is_printed_as_it_is(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"role": "[/bold]", "prompt": "a", "answer": "b"}) + "\n", encoding="utf-8")
    code, text = run(config(path))
    assert code == 2
    assert "unknown role '[/bold]'" in text


def test_validation_sources_are_checked_too(tmp_path):
    settings = config(write_lines(tmp_path / "own.jsonl", OWN))
    held = write_lines(tmp_path / "held.jsonl", [OWN[0], {"role": "odd"}])
    settings.validation.sources = [SourceConfig(path=str(held))]
    code, text = run(settings)
    assert code == 2
    assert f"{held}:2: unknown role 'odd'" in text
    assert "1 bad record:" in text


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_but_bad_records_is_still_reported(tmp_path, skip):
    path = tmp_path / "own.jsonl"
    path.write_text("{\n{\n", encoding="utf-8")
    code, text = run(config(path, skip_bad_records=skip))
    assert code == (0 if skip else 2)
    assert "2 bad records" in text


def test_who_listens_gets_the_whole_report_and_the_terminal_nothing(tmp_path, capsys):
    path = write_lines(tmp_path / "own.jsonl", [*OWN, {"role": "odd"}])
    _, text = run(config(path))
    assert "records" in text
    assert f"{path}:6: unknown role 'odd'" in text
    assert capsys.readouterr().out == ""
    with saying(None):
        assert run_check(config(path), None) == 2
    assert capsys.readouterr().out == ""


def test_turns_and_tools_are_counted(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {}}]}
    told = [TALK[0], call, {"role": "tool", "content": "It is here."}]
    rows = [
        {"role": "unsafe", "tools": [{"name": "find"}], "messages": told, "answer": {"tool_calls": call["tool_calls"]}},
        {"role": "unsafe", "messages": [*TALK, TALK[0]], "answer": "Sure."},
        {"role": "unsafe", "prompt": "fox", "answer": "Sure."},
        {"role": "retain", "messages": [*TALK, *TALK]},
    ]
    sources = [SourceConfig(path=str(write_lines(tmp_path / "own.jsonl", rows)))]
    report = check_data(sources, chat_tokenizers.make(template=chat_tokenizers.TAGGED), earlier_turns=True)
    assert not report.bad
    assert report.notes[1:] == [
        "of 3 unsafe records: 2 with earlier turns of the assistant, 1 with tools on offer, 1 with tool results, "
        "1 with an answer that calls tools"
    ]
    refused = check_data(sources, chat_tokenizers.make())
    assert [bad.origin.rpartition(":")[2] for bad in refused.bad] == ["1"]
    assert "leaves out the tools that are offered" in refused.bad[0].reason
    unplaced = chat_tokenizers.TAGGED.replace("<|im_end|>", "")
    found = check_data(sources, chat_tokenizers.make(template=unplaced), earlier_turns=True)
    assert [bad.reason.partition(",")[0] for bad in found.bad] == ["the assistant's earlier turns cannot be found"]
    assert not check_data(sources, chat_tokenizers.make(template=unplaced)).bad
