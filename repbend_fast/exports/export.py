"""Write a run's result as other programs take it: a PEFT adapter, an ordinary transformers folder, or a GGUF file with
Ollama's Modelfile; and load it again to see that it is what was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repbend_fast.config import Config, load_config
from repbend_fast.console import note, remark
from repbend_fast.errors import CheckFailedError, UserError
from repbend_fast.exports.adapter_folder import write_adapter
from repbend_fast.exports.card import write_card
from repbend_fast.exports.check_export import Check, Written, compare_logits, plain_settings
from repbend_fast.exports.check_tokens import stop_differences, tokenizer_differences
from repbend_fast.exports.gguf_file import GgufPlan, header_differences, planned_gguf, write_gguf
from repbend_fast.exports.merged import generation_of, merged_weights, write_model
from repbend_fast.exports.modelfile import modelfile
from repbend_fast.exports.probes import probes
from repbend_fast.exports.request import KINDS, Request
from repbend_fast.models.load import load_tokenizer, read_model_config
from repbend_fast.runs.folder import RunFolder, check_new, only_writer, write_folder, write_json

if TYPE_CHECKING:
    from repbend_fast.data.tokenizer import Tokenizer
    from repbend_fast.exports.merged import Weights


@dataclass(frozen=True)
class _Export:
    """A request with what it is about."""

    request: Request
    run: RunFolder
    config: Config
    tokenizer: Tokenizer


def export_merged(folder: Path, out: Path) -> Path:
    """The merged model of the run in ``folder``, not looked at again; see :func:`export_run`."""
    export_run(Request(folder, out, check=False))
    return out


def export_run(request: Request) -> Check | None:
    """Write the run's result to ``request.out``: weights in ``model.dtype``, tokenizer, generation settings, a model
    card, and ``check.json`` with what the check found.

    An NF4 run is merged into the unquantised base: rounded to NF4 again, the merged weights would lose part of the
    adapter or all of it. It is another model than the one that was measured, which a note says.

    Raises:
        CheckFailedError: what was written is not what was trained; it stays, to be looked at.
        UserError: the run has no adapter yet, ``out`` holds something, a family that GGUF files are not written for, or
            files that cannot be written.
    """
    if request.kind not in KINDS:
        raise UserError(f"--format={request.kind}: known: {', '.join(KINDS)}")
    if request.gguf_type is not None and request.kind != "gguf":
        raise UserError("--type is of GGUF files; add --format gguf")
    with only_writer(RunFolder(request.out), "export", "choose another --out"):
        check_new(request.out)
        return _exported(request)


def _exported(request: Request) -> Check | None:
    run = RunFolder(request.folder)
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{request.folder}: no adapter yet; resume the run with repbend-fast train --resume {request.folder}"
        )
    config: Config = load_config(str(run.config))
    export = _Export(request, run, config, load_tokenizer(config.model))
    plan = None
    write: Callable[[_Export, Path], None] = _write_merged if request.kind == "merged" else _write_adapter
    if request.kind == "gguf":
        weights = merged_weights(config, run.adapter)
        plan = _gguf_plan(export, weights)
        write = _gguf_writer(plan, weights)

    def fill(target: Path) -> None:
        write(export, target)
        write_card(target, config, run, request.kind, None)

    if request.out.is_dir():
        request.out.rmdir()  # only an empty folder: one filled meanwhile raises and keeps what it holds
    write_folder(request.out, fill)
    found = _checked(export, plan) if request.check else None
    if request.kind != "adapter" and (unmeasured := unmeasured_note(request.folder)):
        note(unmeasured)
    if found is not None and found.problems:
        raise CheckFailedError(
            f"{request.out}: not what was trained ({'; '.join(found.problems)}); do not use it, look at it"
        )
    return found


def _write_merged(export: _Export, target: Path) -> None:
    write_model(export.config, merged_weights(export.config, export.run.adapter), target)
    export.tokenizer.save_pretrained(str(target))


def _write_adapter(export: _Export, target: Path) -> None:
    write_adapter(export.config, export.run.adapter, target)
    export.tokenizer.save_pretrained(str(target))


def _gguf_plan(export: _Export, weights: Weights) -> GgufPlan:
    model = export.config.model
    rows = weights.kept["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in weights.kept else 0
    name = f"{_short(model.name)}-bent"
    return planned_gguf(name, read_model_config(model), export.tokenizer, rows, export.request.gguf_type, model.dtype)


def _short(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name.removeprefix("package:")).name) or "model"


def _gguf_writer(plan: GgufPlan, weights: Weights) -> Callable[[_Export, Path], None]:
    def write(export: _Export, target: Path) -> None:
        file = f"{plan.name}-{plan.kind}.gguf"
        write_gguf(target / file, plan, weights)
        stops = generation_of(export.config, plan.shape).to_dict().get("eos_token_id")
        ids = stops if isinstance(stops, list) else [stops]
        known = dict.fromkeys(i for i in (export.tokenizer.eos_token_id, *ids) if isinstance(i, int))
        text, whole = modelfile(file, export.tokenizer, known)
        (target / "Modelfile").write_text(text, encoding="utf-8")
        if not whole:
            remark("Modelfile: the chat template is no plain sequence of turns; Ollama takes the one in the GGUF file")

    return write


def _checked(export: _Export, plan: GgufPlan | None) -> Check:
    config, out = export.config, export.request.out
    vocabulary = read_model_config(config.model).get_text_config().vocab_size
    texts = probes(config, export.tokenizer, vocabulary)
    check = compare_logits(config, export.run.adapter, _written(export, plan), texts, export.request.bound)
    check.differences += _token_differences(export, plan)
    write_json(out / "check.json", check.as_dict())
    write_card(out, config, export.run, export.request.kind, check)
    remark(f"check, on {check.what}:")
    for row in check.rows:
        remark(f"  {row.line()}")
    for warning in check.warnings:
        note(warning)
    return check


def _written(export: _Export, plan: GgufPlan | None) -> Written:
    """How what was written is loaded."""
    out, plain = str(export.request.out), plain_settings(export.config)
    bare = plain.model_copy(update={"name": out, "adapter": None, "gguf_file": None, "revision": None})
    if plan is not None:
        stored_as = _LIKE.get(plan.kind, plan.kind)
        return Written(bare, stored_as, gguf=(export.request.out / f"{plan.name}-{plan.kind}.gguf", plan.shape))
    if export.request.kind == "merged":
        return Written(bare, export.config.model.dtype)
    return Written(plain.model_copy(update={"adapter": None}), export.config.model.dtype, adapter=export.request.out)


_LIKE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def _token_differences(export: _Export, plan: GgufPlan | None) -> list[str]:
    out = export.request.out
    if plan is not None:
        return header_differences(out / f"{plan.name}-{plan.kind}.gguf", plan)
    found = tokenizer_differences(export.tokenizer, out)
    if export.request.kind == "merged":
        base = generation_of(export.config, read_model_config(export.config.model)).to_dict()
        found += stop_differences(base, _json((out / "generation_config.json").read_text(encoding="utf-8")))
    return found


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
