"""Memory: the levers of a step, the planner that chooses them, and what happens when memory runs out all the same."""
