"""A model under every attack, those that change it included."""
