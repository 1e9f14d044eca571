"""Records of one role that are encoded when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from repbend_fast.data.reasoning import holds_reasoning
from repbend_fast.data.records import PairSequence, Record, Role, Sequence
from repbend_fast.data.tokenize import ChatEncoder, characters_of


class EncodedRecords(Seq[Sequence | PairSequence]):
    """Records of one role, encoded when they are asked for: a large data set costs neither the time nor the memory of
    all its ids.

    Building it renders one record per shape of conversation, and every one whose answers hold reasoning, so that a
    template that cannot hold them stops the run before training.
    ``encoder.truncated`` counts a record when it is first asked for, not again in later epochs.
    """

    def __init__(self, records: Seq[Record], encoder: ChatEncoder) -> None:
        self.records = records
        self.encoder = encoder
        self._counted: set[int] = set()
        seen: set[tuple[str, ...]] = set()
        for record in records:
            shape = (*(m.role + "*" * m.calls for m in record.messages), *(record.tools and ("tools",)))
            if (
                shape not in seen
                or any(map(holds_reasoning, (record.messages[-1].content, record.answer, record.safe_answer)))
                or any(turn.calls for turn in record.answers)
            ):
                seen.add(shape)
                encoder.check_renders(record)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        encoded = self.encoder.encode(self.records[position], count=position not in self._counted)
        self._counted.add(position)
        return encoded

    def lengths(self) -> list[int]:
        """Characters of each record's texts, of a pair with its longer answer: a stand-in for tokens that costs no
        encoding.
        """
        return [characters_of(r) for r in self.records]

    def fingerprint(self) -> str:
        """Hash of the records' texts in order and of the encoder: equal fingerprints give equal ids."""
        digest = hashlib.sha256(self.encoder.fingerprint().encode())
        for record in self.records:
            digest.update(json.dumps(record.content).encode())
        return digest.hexdigest()


def encode_records(records: Mapping[Role, Seq[Record]], encoder: ChatEncoder) -> dict[Role, EncodedRecords]:
    """Lazily encoded records per role, ready for ``BatchSampler``."""
    return {role: EncodedRecords(of_role, encoder) for role, of_role in records.items()}


def dropped_reasoning(records: Mapping[Role, Seq[Record]], encoder: ChatEncoder) -> list[str]:
    """A line where the template leaves reasoning of earlier turns out."""
    dropped = [record for of_role in records.values() for record in of_role if encoder.drops_reasoning(record)]
    if not dropped:
        return []
    return [
        "the chat template leaves out the reasoning of earlier turns, as it does when the model talks: in "
        f"{len(dropped)} "
        f"record{'s' if len(dropped) > 1 else ''}, {dropped[0].origin} for one"
    ]
