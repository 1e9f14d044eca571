"""``serve`` as a process: it says where it listens and answers; Ctrl-C ends it cleanly, in the middle of an answer."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from interruptible import take_interrupts
from tiny_run import TinyRun

from repbend_fast.cli import main


def test_ctrl_c_ends_an_answer_and_the_server(whole: TinyRun) -> None:
    command = [sys.executable, "-m", "repbend_fast.cli", "serve", str(whole.path), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=take_interrupts,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serving base, bent of .* at http://127\.0\.0\.1:(\d+)/v1 \(model=bent\)", line)
            assert found, line
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            body = {"messages": [{"role": "user", "content": "What is rain?"}], "stream": True, "max_tokens": 400}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            assert connection.getresponse().read(10)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "note: ended\n")


def test_an_address_of_others_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "there/is/nothing", "--host", "0.0.0.0"]) == 2
    assert "--allow-remote" in capsys.readouterr().err
    assert main(["serve", "there/is/nothing", "--port=99999"]) == 2
    assert "--port=99999" in capsys.readouterr().err
