"""The mutants: faults put into the code one at a time, each with the tests that have to fail. ``mutants.py`` runs them.

A mutant is one change of text that changes what the code does. ``old`` occurs exactly once in its file; a test holds
the list to that.
"""

from __future__ import annotations

from benchmarks.faults.mutants_of_low_rank import LOW_RANK
from benchmarks.faults.mutants_of_ops import HEADS, LOOPS, TAPS
from benchmarks.faults.mutants_of_saving import SAVING
from benchmarks.faults.mutants_of_training import LORA, OBJECTIVES, PROOF, STEP

MUTANTS = [*HEADS, *TAPS, *LOOPS, *LOW_RANK, *LORA, *STEP, *PROOF, *OBJECTIVES, *SAVING]
