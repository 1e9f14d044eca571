"""``repbend-fast compare``: several methods on one model with equal settings, learning rates chosen on validation, one
table.
"""

from repbend_fast.compare.command import run_compare
from repbend_fast.compare.comparison import DEFAULT_RECIPES, Comparison, load_comparison

__all__ = ["DEFAULT_RECIPES", "Comparison", "load_comparison", "run_compare"]
