"""A run's result as other programs take it, and the check that it is what was trained."""
