"""Parity with values recorded from the published implementations."""

from repbend_fast.verify.parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Check,
    Verification,
    run_verify,
    verify_folder,
)

__all__ = ["GRADIENT_TOLERANCE", "LOSS_TOLERANCE", "Check", "Verification", "run_verify", "verify_folder"]
