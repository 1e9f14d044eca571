"""Attacks on a model, one file each behind :class:`~repbend_fast.evaluation.attacks.protocol.Attack`."""
