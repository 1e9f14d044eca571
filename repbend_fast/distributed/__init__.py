"""Several processes that train one adapter: who they are, what they tell each other, and how they end together."""
