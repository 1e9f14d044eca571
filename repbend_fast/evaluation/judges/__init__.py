"""Judges of answers, one file each behind :class:`~repbend_fast.evaluation.judges.protocol.Judge`."""
