"""``lens``: the logit lens of a prompt on both sides, free and forced, and the picture of the bending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repbend_fast.data.prompts import Kind, Prompt, load_prompts
from repbend_fast.data.records import Message
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.errors import UserError
from repbend_fast.evaluation.bending import measure_bending
from repbend_fast.evaluation.lens import read_panel
from repbend_fast.models.decoder import causal_model
from repbend_fast.report.bending_picture import bending_svg
from repbend_fast.report.lens_page import lens_page, svg_file
from repbend_fast.report.lens_picture import lens_svg
from repbend_fast.runs.folder import write_json, write_text
from repbend_fast.serving.loaded import Sides

SUFFIXES = (".html", ".svg", ".json")
KIND_OF: dict[str, Kind] = {"safe": "ordinary", "unsafe": "attack"}


def look(sides: Sides, prompt: str, prefill: str, tokens: int) -> dict[str, object]:
    """The lens on the last ``tokens`` tokens of ``prompt``, and of ``prompt`` with the answer made to begin with
    ``prefill``, which may be empty: what :func:`repbend_fast.report.lens_page.lens_page` takes.
    """
    cut = sides.encoder.truncated.prompts
    messages = (Message("user", prompt),)
    forms = {False: sides.encoder.prompt_ids(messages)}
    if prefill:
        forms[True] = sides.encoder.prompt_ids(messages, prefill)
    _check_length(sides, max(map(len, forms.values())))
    panels = []
    for side in sides.names:
        with sides.on(side) as model:
            for forced, ids in forms.items():
                panel = read_panel(model, sides.encoder.tokenizer, ids, tokens, side=side, forced=forced)
                panels.append(panel.as_dict())
    notes = []
    if sides.encoder.truncated.prompts > cut:
        notes.append(f"The prompt is longer than {sides.encoder.max_prompt_tokens:,} tokens; its middle was left out.")
    return {
        "format": 1,
        "model": sides.name,
        "adapter": sides.adapter,
        "prompt": prompt,
        "prefill": prefill,
        "notes": notes,
        "vocabulary": causal_model(sides.model).get_output_embeddings().weight.shape[0],
        "panels": panels,
    }


def _check_length(sides: Sides, tokens: int) -> None:
    if sides.positions is not None and tokens > sides.positions:
        raise UserError(
            f"--prefill: prompt and forced answer have {tokens} tokens, the model has {sides.positions} positions; "
            "shorten them"
        )


def bending_of(sides: Sides, prompts: str, prefill: str, count: int) -> dict[str, object]:
    """The bending picture's data from ``count`` ordinary and ``count`` attack prompts of a set (``demo`` or a file),
    with the answers made to begin with ``prefill``, which may be empty.

    Raises:
        UserError: there is no bent side, or the set lacks prompts of a kind.
    """
    if "bent" not in sides.names:
        raise UserError("--bending compares base and bent; name a run, or an adapter with --adapter")
    found = load_prompts(PromptsConfig(path=prompts, limit=count))
    sequences = {kind: _encoded(sides, found, KIND_OF[kind], prompts, prefill) for kind in KIND_OF}
    return measure_bending(sides.on, sequences) | {"model": sides.name, "prompts": prompts, "prefill": prefill}


def _encoded(sides: Sides, found: Sequence[Prompt], kind: Kind, source: str, prefill: str) -> list[list[int]]:
    chosen = [prompt for prompt in found if prompt.kind == kind]
    if not chosen:
        raise UserError(f"--bending={source}: no {kind} prompts in it; the picture needs ordinary and attack prompts")
    return [sides.encoder.prompt_ids(prompt.conversation(), prefill, prompt.tools) for prompt in chosen]


def check_out(out: Path, bending: bool) -> None:
    """Refuse a file that ``write_look`` could not write; called before anything is loaded."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out={out}: give a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if out.is_dir():
        raise UserError(f"--out={out}: is a folder; give a file")
    if bending and out.suffix.lower() != ".html" and out.stem == "bending":
        raise UserError(f"--out={out}: bending{out.suffix} is the other picture's file; choose another name")


def write_look(out: Path, data: dict[str, object], bending: dict[str, object] | None) -> list[Path]:
    """Write ``out`` by its suffix. A page holds both pictures; beside another file the bending has one of its own,
    ``bending`` with the same suffix. Returns what was written.
    """
    suffix = out.suffix.lower()
    if suffix == ".html":
        write_text(out, lens_page(data, bending))
        return [out]
    files = {out: (data, lens_svg)} | ({out.with_stem("bending"): (bending, bending_svg)} if bending else {})
    for path, (content, draw) in files.items():
        if suffix == ".json":
            write_json(path, content)
        else:
            write_text(path, svg_file(draw(content)))
    return list(files)
