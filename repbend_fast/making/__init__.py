"""Training data that the model writes itself, from a policy: what it must not answer, and what it goes on answering."""
