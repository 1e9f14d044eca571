"""The demo's fictional world: restricted made-up items, ordinary questions, conversations. Everything here is invented
or harmless.
"""

from repbend_fast.data.demo.world import prompts, training_records

__all__ = ["prompts", "training_records"]
