"""What the planner measures on shapes alone, once per kind of run, kept between calls (``planning.kept``).

The key is all that a peak depends on: the model's shape and how its weights are held, adapter, objective, lengths,
examples, the device's kind, levers, and the versions of everything that runs. A model with code of its own, or an
objective of the user's, may change without any of these; nothing of theirs is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from repbend_fast.config import Config
from repbend_fast.console import CountLine
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import Shape
from repbend_fast.objectives.streams import Stream
from repbend_fast.planning import kept
from repbend_fast.planning.batches import Limits
from repbend_fast.planning.peaks import Peak, StreamPeak
from repbend_fast.step.levers import Levers

T = TypeVar("T")

_STREAM_PEAKS = TypeAdapter(list[StreamPeak])
_PEAK = TypeAdapter(Peak)

PIECES, WHOLE = "pieces", "whole"
"""Kinds of measurements, which take different times: a stream's pieces in a few blocks, and a stream in all of them."""
OF_MODEL = ("dtype", "quantization", "double_quantization", "attention")
OF_TRAINING = ("examples", "retain_examples", "refusal_examples", "steps")


class Profile:
    """The measurements of one planner. ``progress`` counts those that are made, and is silent until a plan shows it.

    Args:
        key: of ``profile_key``; None keeps nothing.
    """

    def __init__(self, key: kept.Json) -> None:
        self.key = key
        self.progress = _line()

    def shown(self) -> CountLine:
        """A fresh line of progress, to be entered."""
        self.progress = _line()
        return self.progress

    def expect(self, pieces: int, whole: int) -> None:
        """So many streams are going to be measured in pieces, and so many through all blocks."""
        self.progress.expect(pieces, PIECES)
        self.progress.expect(whole, WHOLE)

    def measured(self, part: str, work: Callable[[], T], kind: str = PIECES) -> T:
        """Do one measurement."""
        if self.progress.done >= self.progress.total:
            self.progress.expect(1, kind)
        result = work()
        self.progress.advance(part, kind=kind)
        return result

    def stream_peaks(self, measure: Callable[[], list[StreamPeak]]) -> list[StreamPeak]:
        """The peaks of all streams at two sizes."""
        return self._kept("peaks", {"profile": self.key}, _STREAM_PEAKS, measure)

    def batch(self, streams: Seq[Stream], levers: Levers, measure: Callable[[], Peak]) -> Peak:
        """The peak of one stream as a piece at full depth, or of several that share their passes."""
        held: list[kept.Json] = [
            [s.name, [[len(x), x.prompt_length, *x.earlier] for x in s.sequences]] for s in streams
        ]
        key = {"profile": self.key, "streams": held, "levers": _text(levers.as_dict())}
        names = " and ".join(stream.name for stream in streams)
        return self._kept("piece", key, _PEAK, lambda: self.measured(f"{names} stream, all blocks", measure, WHOLE))

    def _kept(self, kind: str, key: kept.Json, form: TypeAdapter[T], measure: Callable[[], T]) -> T:
        if self.key is None:
            return measure()
        try:
            return form.validate_python(kept.read(kind, key))
        except ValidationError:
            found = measure()
            kept.write(kind, key, form.dump_python(found, mode="json"))
            return found


def profile_key(
    config: Config, shape: Shape, device: torch.device, limits: Limits, levers: Levers, attention: str
) -> kept.Json:
    """What the measurements of a planner depend on; None where that cannot be said."""
    if config.model.trust_remote_code or ":" in config.objective.name:
        return None
    autocast = autocast_dtype(config, device)
    return {
        "versions": kept.versions(),
        "shape": _text({name: value for name, value in shape.to_dict().items() if name != "_name_or_path"}),
        "model": {name: str(getattr(config.model, name)) for name in OF_MODEL},
        "attention": attention,
        "lora": config.lora.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "limits": asdict(limits),
        "training": {name: str(getattr(config.training, name)) for name in OF_TRAINING},
        "autocast": str(autocast),
        "device": device.type,
        # Scratch of the ops on a CPU grows with its threads.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "levers": _text(levers.as_dict()),
    }


def _text(values: dict[str, object]) -> str:
    return repr(sorted(values.items()))


def _line() -> CountLine:
    return CountLine("planning: runs on shapes alone", 0, kinds={}, stays=False)
