"""``train RECIPE --dry-run=full``: everything up to the first step, and a table of what was shown for the model."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from repbend_fast.config import Config
from repbend_fast.console import show
from repbend_fast.models.coverage import names_and_sizes
from repbend_fast.runs.folder import RunFolder
from repbend_fast.step.proof import Proof
from repbend_fast.training.trainer import make_ready, make_trainer


def dry_run(config: Config, resume: Path | None = None) -> int:
    """Load data and model, run the proof, print it. Trains nothing and writes nothing. Returns 0.

    Raises:
        UserError: as training would.
    """
    run = RunFolder(resume if resume is not None else config.output.folder)
    trainer = make_trainer(config, run, make_ready(config, run, resume is not None))
    trainer.batches.close()
    assert trainer.proof is not None
    show(proof_table(trainer.proof))
    return 0


def proof_table(proof: Proof) -> Table:
    """Checks first, then the kinds of block with what LoRA adapts of them."""
    table = Table(title=f"shown for this model in {proof.seconds:.2f} s; packing {proof.packing}")
    table.add_column("what", overflow="fold")
    table.add_column("result", overflow="fold")
    for check in proof.checks:
        error = "" if check.error is None else f"error {check.error:.2g} (bound {check.bound:.2g})"
        parts = [
            "holds" if check.holds and check.error is not None else "not compared" if check.holds else "does not hold",
            error,
            check.remark,
        ]
        table.add_row(check.name, escape("; ".join(part for part in parts if part)))
    table.add_section()
    for kind in proof.coverage:
        share = f"LoRA on {kind.adapted:,} of {kind.weights:,} weights ({kind.adapted / max(1, kind.weights):.0%})"
        if not kind.wanted:
            share = f"{kind.weights:,} weights, not in lora.blocks"
        left = f"left out: {names_and_sizes(kind.left_out)}" if kind.left_out and kind.wanted else ""
        loose = f"not in NF4: {names_and_sizes(kind.unquantized)}" if kind.unquantized else ""
        table.add_row(
            f"{kind.where}: {escape(kind.name)}", escape("; ".join(part for part in (share, left, loose) if part))
        )
    return table
