"""Bending inside of other people's training loops."""

from repbend_fast.integration.trainer_mixin import BendingMixin

__all__ = ["BendingMixin"]
