"""Training: the loop, what is asked before it, the guard that watches it, and what it saves."""
