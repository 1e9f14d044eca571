"""Planning: what a step with given levers will take, in bytes and in time, and the levers for a budget."""
