"""The training step of one stream: reference pass, tapped adapted pass, backward, in pieces that memory allows."""

from repbend_fast.step.checked import checked_runner
from repbend_fast.step.dropout_keys import dropout_seed
from repbend_fast.step.meter import StreamResult
from repbend_fast.step.runner import StreamRunner

__all__ = ["StreamResult", "StreamRunner", "checked_runner", "dropout_seed"]
