"""Reading weights shows our own bar, and no library's."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import transformers.core_model_loading as loading
import transformers.modeling_gguf_pytorch_utils as gguf
from rich.console import Console
from tiny_run import write_model

from repbend_fast import console
from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import load_model
from repbend_fast.models.counted_loading import counted_loading


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=140, color_system=None)
    monkeypatch.setattr(console, "terminal_console", lambda: terminal)
    return file


def test_a_models_weights_are_counted(
    tmp_path: Path, drawn: io.StringIO, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    before = loading.tqdm, gguf.tqdm
    capfd.readouterr()
    load_model(ModelConfig(name=str(folder), dtype="float32", device="cpu"))
    assert "loading weights" in drawn.getvalue()
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert (loading.tqdm, gguf.tqdm) == before
    assert console._LiveBar._drawn is None


def test_a_model_that_breaks_off_leaves_no_bar(tmp_path: Path, drawn: io.StringIO) -> None:
    def break_off() -> None:
        for _ in gguf.tqdm([1, 2, 3], desc="Converting"):
            raise RuntimeError

    with pytest.raises(RuntimeError), counted_loading():
        break_off()
    assert "reading GGUF tensors" in drawn.getvalue()
    assert console._LiveBar._drawn is None
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError):
        load_model(ModelConfig(name=str(tmp_path), dtype="float32", device="cpu"))
    assert console._LiveBar._drawn is None


def test_the_notice_of_a_missing_cpu_kernel_is_ours_to_silence(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kept = list(logger.filters)
    with console.hushed():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "offline")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert logger.filters == kept
