"""Which models can be bent, as a record and a page: ``make models`` sweeps over every causal LM that transformers
registers.

Written are ``benchmarks/results/models.json`` and, made of it alone, ``docs/models.md``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
HEAD = Path(__file__).with_suffix(".md")
"""The page above its table."""
POPULAR = (
    "bert bloom cohere2 deepseek_v3 deepseek_v4 exaone4 falcon falcon_h1 gemma gemma2 gemma3 gemma3_text glm4 gpt2 "
    "gpt_neox gpt_oss gptj granite lfm2 llama llama4_text mamba mistral mixtral modernbert-decoder mpt nemotron "
    "olmo2 opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma smollm3 stablelm starcoder2"
).split()
"""The types whose row every run of the tests decides anew; the others' rows are decided by ``make test-models``."""


def verdict_of(row: Mapping[str, object]) -> str:
    """The row's verdict in words."""
    if not row["layout"]:
        return "refused"
    parts = ["bends"]
    if row["head"]:
        parts.append("without logits")
    if row["attention"]:
        parts.append(f"with `model.attention={row['attention']}`")
    return " ".join(parts) + (", padded" if row["layout"] == "padded" else "")


def _remarks(row: Mapping[str, object]) -> Iterator[str]:
    if row["why"]:
        yield str(row["why"]).partition("; ")[0] if row["layout"] else str(row["why"])
    if row["head"]:
        yield str(row["head"]).partition("; ")[0]
    for key, words in (("left_out", "left out"), ("idle", "without effect")):
        names = cast("list[str]", row[key])
        if names:
            yield f"{words}: {', '.join(f'`{name}`' for name in names)}"


def page(record: Mapping[str, object]) -> str:
    """``docs/models.md`` of a record."""
    from repbend_fast.config import load_config
    from repbend_fast.config.shipped import recipe_names, recipe_text

    rows = cast("list[dict[str, object]]", record["rows"])
    verdicts = [verdict_of(row) for row in rows]
    bends = sum(verdict.startswith("bends") for verdict in verdicts)
    counts = (
        f"Of {len(rows)} types {bends} bend, {sum(v.endswith('padded') for v in verdicts)} of them padded; "
        f"{len(rows) - bends} are refused."
    )
    recipes = ["| recipe | model | window |", "| --- | --- | --- |"]
    for name in recipe_names():
        if "\nbase: any\n" in recipe_text(name):
            config = load_config(name, ["data.sources=mine.jsonl"])
            recipes.append(
                f"| `{name}` | `{config.model.name}` | {config.objective.window[0]}–{config.objective.window[-1]} |"
            )
    versions = cast("dict[str, str]", record["versions"])
    head = HEAD.read_text(encoding="utf-8").rstrip("\n")
    for name, value in {"VERSION": versions["transformers"], "COUNTS": counts, "RECIPES": "\n".join(recipes)}.items():
        head = head.replace(f"@{name}@", value)
    lines = [head]
    for row, said in zip(rows, verdicts):
        test = "`make test`" if row["model_type"] in POPULAR else "`make test-models`"
        remarks = "; ".join(_remarks(row)).replace("|", "\\|")
        lines.append(f"| `{row['model_type']}` | {said} | {remarks} | {test} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Decide every row, and write record and page."""
    import transformers
    from model_zoo import MODEL_TYPES, verdict

    from repbend_fast.environment import environment

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for number, model_type in enumerate(MODEL_TYPES, 1):
        rows.append(asdict(verdict(model_type)))
        print(f"{number}/{len(MODEL_TYPES)} {model_type}: {verdict_of(rows[-1])}", file=sys.stderr, flush=True)
    record = environment() | {"rows": rows}
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
