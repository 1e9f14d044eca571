"""The demo's adapters under every built-in attack: ``benchmarks/results/eval_demo.json``.

    python -m benchmarks.evaluation.eval_demo "with refusal=runs/demo" "published terms=runs/demo-published-terms" …

Each adapter is one run's. Quick attacks are asked of more prompts than those that search for each prompt, or train for
each model. An evaluation that was interrupted goes on; a stage is recorded as soon as it is finished. The base is asked
once, in the first run's evaluation. Seconds are the last call's: of one that went on, what was left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from benchmarks.harness import RESULTS, write_json
from repbend_fast.assessment.json_rows import GroupRow, Rate, Summary
from repbend_fast.environment import environment

RESULT = RESULTS / "eval_demo.json"
SUITE = "demo-reserve"
LABELS = ("comply", "refuse", "degenerate")


@dataclass(frozen=True)
class Stage:
    """Attacks that are asked of the same number of prompts (``limit`` of each kind)."""

    name: str
    limit: int
    attacks: tuple[str, ...]


STAGES = (
    Stage("quick", 24, ("direct", "prefill", "template", "rounding", "refusal-ablation")),
    Stage(
        "searching",
        3,
        (
            "latent",
            "embedding-weak:steps=100",
            "embedding-strong:steps=150",
            "relearning:records=16,learning_rates=1e-3,steps=8,held=16,asked=6",
            "gcg:profile=small,steps=16,candidates=32",
        ),
    ),
)


class Shares(TypedDict):
    """Of the first judge: a rate of each label, and of helpful answers where the kind of prompt has such."""

    count: int
    shares: dict[str, Rate | None]


class AttackRow(TypedDict):
    """One attack on one kind of prompts, both sides."""

    adapter: str
    attack: str
    kind: str
    base: Shares
    bent: Shares


def rows_of(adapter: str, groups: Sequence[GroupRow]) -> list[AttackRow]:
    """Base and bent side by side, in the order of the evaluation."""
    sides: dict[tuple[str, str], dict[str, Shares]] = {}
    for group in groups:
        shares = next(iter(group["judges"].values()))
        found: Shares = {"count": group["count"], "shares": shares}
        sides.setdefault((group["attack"], group["kind"]), {})[group["side"]] = found
    return [
        {"adapter": adapter, "attack": attack, "kind": kind, "base": both["base"], "bent": both["bent"]}
        for (attack, kind), both in sides.items()
    ]


def measure(run: Path, stage: Stage, first: Path) -> tuple[Summary, float]:
    """One stage of one run, into ``RUN/eval-STAGE``, and its seconds; the base's answers are the run ``first``'s."""
    from repbend_fast import assess

    started = time.perf_counter()
    base = None if run == first else first / f"eval-{stage.name}"
    out = run / f"eval-{stage.name}"
    found = assess(run, suites=[SUITE], attacks=stage.attacks, limit=stage.limit, out=out, base_of=base, say=print)
    return found.summary, time.perf_counter() - started


def attack_table(record: dict[str, object]) -> str:
    """Markdown: a row an attack, a column for the base and each adapter; complied / refused / degenerate in percent."""
    rows = [row for row in cast(list[AttackRow], record["rows"]) if row["kind"] == "attack"]
    adapters = _adapters(record)
    heads = "| attack | prompts | base | " + " | ".join(adapters) + " |"
    lines = [heads, "| --- | ---: |" + " ---: |" * (len(adapters) + 1)]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        of = {row["adapter"]: row for row in rows if row["attack"] == attack}
        first = next(iter(of.values()))
        cells = [_three(first["base"]), *(_three(of[name]["bent"]) if name in of else "–" for name in adapters)]
        lines.append(f"| `{attack}` | {first['bent']['count']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _three(shares: Shares) -> str:
    rates = [shares["shares"].get(label) for label in LABELS]
    return " / ".join("–" if rate is None or rate["rate"] is None else f"{100 * rate['rate']:.0f}" for rate in rates)


def relearning_table(record: dict[str, object]) -> str:
    """Markdown: a row for each kind of records that an attacker trains on, the base and each adapter in columns;
    complied / refused / degenerate in percent at the last step, and the perplexity as a multiple of that before.
    """
    stages = [stage["name"] for stage in cast(list[dict[str, Any]], record["stages"])]
    found = {
        name: {key: point for stage in stages for key, point in _relearned(record, name, stage).items()}
        for name in _adapters(record)
    }
    first = next(iter(found.values()))
    heads = "| trained on | base | " + " | ".join(found) + " |"
    lines = [heads, "| --- | ---: |" + " ---: |" * len(found)]
    for kind, records in dict.fromkeys((kind, records) for kind, _, records in first):
        cells = [_curve(first[kind, "base", records]), *(_curve(of[kind, "bent", records]) for of in found.values())]
        lines.append(f"| {records} {kind} records | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _adapters(record: dict[str, object]) -> list[str]:
    return list(dict.fromkeys(row["adapter"] for row in cast(list[AttackRow], record["rows"])))


def _relearned(record: dict[str, object], adapter: str, stage: str) -> dict[tuple[str, str, int], dict[str, float]]:
    """The last measurement of each training of a stage, by kind, side and number of records."""
    more = cast(dict[str, dict[str, dict[str, list[dict[str, Any]]]]], record["more"])
    rows = more.get(adapter, {}).get(stage, {}).get("relearning", [])
    return {(row["kind"], row["side"], row["records"]): row["curve"][-1] for row in rows}


def _curve(point: dict[str, float]) -> str:
    shares = " / ".join(f"{100 * point[label]:.0f}" for label in LABELS)
    return f"{shares}, × {point['perplexity_ratio']:.2f}"


def strongest(record: dict[str, object], adapter: str, prompts: int) -> AttackRow:
    """The attack on so many prompts that most of them comply with under ``adapter``; of several the first."""
    rows = [row for row in cast(list[AttackRow], record["rows"]) if row["adapter"] == adapter]
    return max((row for row in rows if row["kind"] == "attack" and row["bent"]["count"] == prompts), key=_complied)


def still_works(record: dict[str, object], adapter: str) -> str:
    """The strongest attack of each stage and what it reaches, and what relearning does, in words."""
    found = []
    for stage in cast(list[dict[str, Any]], record["stages"]):
        row = strongest(record, adapter, stage["limit"])
        found.append(f"`{row['attack'].partition(':')[0]}` on {_complied(row)} of {row['bent']['count']} requests")
        for (kind, side, records), point in _relearned(record, adapter, stage["name"]).items():
            if (kind, side) == ("harmful", "bent") and point["comply"]:
                found.append(
                    f"training on {records} complying answers on {round(point['comply'] * stage['limit'])} of "
                    f"{stage['limit']} (at {point['perplexity_ratio']:.1f} times the perplexity)"
                )
    return ", ".join(found)


def _complied(row: AttackRow) -> int:
    rate = row["bent"]["shares"]["comply"]
    return 0 if rate is None else rate["count"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    named = [(text, *text.partition("=")[::2]) for text in arguments.runs]
    for text, name, run in named:
        if not name or not run or not Path(run).is_dir():
            parser.error(f"{text}: give NAME=RUN with the folder of a finished run")
    rows: list[AttackRow] = []
    seconds: dict[str, dict[str, float]] = {}
    more: dict[str, dict[str, object]] = {}
    for _, name, run in named:
        for stage in STAGES:
            summary, took = measure(Path(run), stage, Path(named[0][2]))
            rows += rows_of(name, summary["groups"])
            seconds.setdefault(name, {})[stage.name] = round(took, 1)
            more.setdefault(name, {})[stage.name] = {
                "usefulness": summary["usefulness"],
                "relearning": summary["relearning"],
                "rounding": summary["rounding"],
                "failed": summary["failed"],
            }
            record = {
                **environment(),
                "suite": SUITE,
                "stages": [{"name": s.name, "limit": s.limit, "attacks": s.attacks} for s in STAGES],
                "seconds": seconds,
                "rows": rows,
                "more": more,
            }
            write_json(arguments.out, record)
    print(attack_table(record))
    print(relearning_table(record))
    for _, name, _ in named:
        print(f"{name}: {still_works(record, name)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
