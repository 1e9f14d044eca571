"""Merge a run's adapter into its base model and write an ordinary transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repbend_fast.config import Config, load_config
from repbend_fast.errors import UserError
from repbend_fast.models.load import load_model, load_tokenizer
from repbend_fast.runs import RunFolder, write_folder


def export_merged(folder: Path, out: Path) -> Path:
    """Write the merged model of the run in ``folder`` to ``out``: safetensors weights in ``model.dtype``, and the tokenizer.

    An NF4 run is merged into the unquantised base, so that the export has no quantisation error of its own.

    Raises:
        UserError: the run has no adapter yet, ``out`` holds something, or the files cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another")
    run = RunFolder(folder)
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter yet; resume the run with repbend-fast train --resume {folder}")
    config: Config = load_config(str(run.config))
    model = _merged(config, run.adapter)
    tokenizer = load_tokenizer(config.model)

    def fill(target: Path) -> None:
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))

    if out.is_dir():
        out.rmdir()  # only an empty folder: one filled meanwhile raises and keeps what it holds
    write_folder(out, fill)
    return out


def _merged(config: Config, adapter: Path) -> Any:
    from peft import PeftModel

    base: Any = load_model(config.model.model_copy(update={"quantization": "none", "device": "cpu", "liger": False}))
    # A GGUF file leaves its own quantisation settings in the config; the merged weights are plain ones.
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.hf_quantizer = None
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
