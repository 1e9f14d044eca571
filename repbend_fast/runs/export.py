"""Merge a run's adapter into its base model and write an ordinary transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from torch import nn

from repbend_fast.config import Config, load_config
from repbend_fast.console import note
from repbend_fast.errors import UserError
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.models.load import load_model, load_tokenizer
from repbend_fast.runs.folder import RunFolder, check_new, write_folder


def export_merged(folder: Path, out: Path) -> Path:
    """Write the merged model of the run in ``folder`` to ``out``: safetensors weights in ``model.dtype``, and the
    tokenizer.

    An NF4 run is merged into the unquantised base: rounded to NF4 again, the merged weights would lose part of the
    adapter or all of it. It is another model than the one that was measured, which a note says.

    Raises:
        UserError: the run has no adapter yet, ``out`` holds something, or the files cannot be written.
    """
    check_new(out)
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
    if unmeasured := unmeasured_note(folder):
        note(unmeasured)
    return out


def unmeasured_note(folder: Path) -> str | None:
    """One line where the export is another model than the one whose numbers the run holds: trained and measured on the
    NF4 base.

    The numbers are those that the run recorded, of its evaluation or of the validation whose adapter is kept; none
    where it has none.
    """
    run = RunFolder(folder)
    config = load_config(str(run.config))
    if config.model.quantization != "nf4":
        return None
    measured = _measured(run)
    numbers = f"{measured} were measured" if measured else "anything measured on it was measured"
    return (
        f"this run trained on the NF4 base, where {numbers}; the export is the adapter on the unquantised base in "
        f"{config.model.dtype}, another model, which nothing has measured: try it on your own prompts, or serve base "
        "in NF4 and "
        f"adapter apart ({run.adapter})"
    )


def _measured(run: RunFolder) -> str:
    """``KL 0.0712 and perplexity 12.30``, of the evaluation after training, else of the last validation that was the
    best.
    """
    after = _json(run.evaluation.read_text(encoding="utf-8")).get("after", {}) if run.evaluation.is_file() else {}
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    best = next((row for row in map(_json, reversed(lines)) if row.get("type") == "validation" and row.get("best")), {})
    row = after if isinstance(after, dict) and after.get("kl") is not None else best
    names = {"kl": "KL {:.4f}", "perplexity": "perplexity {:.2f}", "attack_direct": "attack success {:.1%}"}
    found = [text.format(row[key]) for key, text in names.items() if isinstance(row.get(key), int | float)]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _json(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}  # a line that an interruption cut off
    return value if isinstance(value, dict) else {}


def _merged(config: Config, adapter: Path) -> CausalLM:
    from peft import PeftModel

    base = load_model(config.model.model_copy(update={"quantization": "none", "device": "cpu", "liger": False}))
    # A GGUF file leaves its own quantisation settings in the config; the merged weights are plain ones.
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.hf_quantizer = None  # type: ignore[attr-defined]
    return cast(AdaptedLM, PeftModel.from_pretrained(cast(nn.Module, base), str(adapter))).merge_and_unload()
