"""Which examples a micro-batch holds: endless, deterministic, resumable; and records held out of training."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

from repbend_fast.data.formats import formats_that_give
from repbend_fast.data.records import ROLES, Batch, BatchSizes, PairSequence, Record, Role, Sequence
from repbend_fast.errors import UserError

Encoded = Sequence | PairSequence
T = TypeVar("T")
MEGABATCH = 50
"""Micro-batches that are sorted by length together: more of them save little padding, fewer mix lengths."""


class BatchSampler:
    """Draws sequences of every required role for a micro-batch of ``sizes``, each role in its own reshuffled epochs;
    pairs of which only the refusal is learned are in ``refused``.

    The order of a role depends on the seed, the role and the epoch alone, so adding a role changes no other. ``sets``
    may be encoded lazily; a set that has ``fingerprint()`` is hashed through it, any other by its ids.

    ``group_by_length`` draws a role's examples of similar length into the same micro-batch. An epoch still holds every
    example once, and each is as likely to come early as late whatever its length; the order then depends on
    ``examples`` too. A set that has ``lengths()`` is asked for them, so that lazily encoded records need not be encoded
    to be sorted.

    Raises ``UserError`` when a required role has no record.
    """

    def __init__(
        self,
        sets: Mapping[Role, Seq[Encoded]],
        sizes: BatchSizes,
        seed: int,
        required_roles: Iterable[Role],
        group_by_length: bool = False,
    ) -> None:
        wanted = set(required_roles)
        self.roles: tuple[Role, ...] = tuple(r for r in ROLES if r in wanted)
        for role in self.roles:
            if not sets.get(role):
                raise UserError(
                    f"data.sources: no `{role}` records, which the objective needs; formats that give them: "
                    f"{formats_that_give(role)}"
                )
        self.sets = {role: sets[role] for role in self.roles}
        self.sizes = sizes
        self.seed = seed
        self.group_by_length = group_by_length
        self._lengths = {role: _set_lengths(of_role) for role, of_role in self.sets.items()} if group_by_length else {}
        self._place = dict.fromkeys(self.roles, (0, 0))
        self._orders: dict[Role, tuple[int, list[int]]] = {}
        self._fingerprint: str | None = None

    def next_batch(self) -> Batch:
        """The next micro-batch: its entries of every required role, in ``pairs`` for role ``pair``; other roles are
        empty.
        """
        drawn: dict[str, tuple[Any, ...]] = {
            role: tuple(self._draw(role) for _ in range(self.sizes.of(role))) for role in self.roles
        }
        pairs = drawn.get("pair", ())
        bent, refused = pairs[: self.sizes.examples], pairs[self.sizes.examples :]
        return Batch(drawn.get("safe", ()), drawn.get("unsafe", ()), bent, drawn.get("retain", ()), refused)

    def state_dict(self) -> dict[str, object]:
        """JSON-able: the place in every role's epochs, and what it belongs to."""
        places = {role: {"epoch": epoch, "position": position} for role, (epoch, position) in self._place.items()}
        return {
            "seed": self.seed,
            **self._counts(),
            "group_by_length": self.group_by_length,
            "fingerprint": self.fingerprint(),
            "places": places,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises ``UserError`` when data, tokenizer, seed, roles or batch size are
        not the same.
        """
        for section, key, own in (
            ("training", "seed", self.seed),
            *(("training", key, count) for key, count in self._counts().items()),
            ("data", "group_by_length", self.group_by_length),
        ):
            # Older checkpoints have none of the last three.
            written = state.get(key, False if key == "group_by_length" else state["examples"])
            if written != own:
                raise UserError(
                    f"cannot resume: {section}.{key}={own}, but the checkpoint was written with {written}; set it back"
                )
        if state.get("fingerprint") != self.fingerprint() or set(state["places"]) != set(self.roles):
            raise UserError(
                "cannot resume: data, tokenizer or token limits differ from those of the checkpoint; "
                "restore them or start a new run in another output.folder"
            )
        self._place = {role: (state["places"][role]["epoch"], state["places"][role]["position"]) for role in self.roles}

    def fingerprint(self) -> str:
        """Hash over the examples of every required role in order."""
        if self._fingerprint is None:
            parts = {role: _set_fingerprint(examples) for role, examples in self.sets.items()}
            self._fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def _counts(self) -> dict[str, int]:
        """Sizes under their settings' names, as a checkpoint has them."""
        of = self.sizes.of
        return {"examples": self.sizes.examples, "retain_examples": of("retain"), "refusal_examples": of("pair")}

    def _draw(self, role: Role) -> Encoded:
        epoch, position = self._place[role]
        if position == len(self.sets[role]):
            epoch, position = epoch + 1, 0
        index = self._order(role, epoch)[position]
        self._place[role] = (epoch, position + 1)
        return self.sets[role][index]

    def _order(self, role: Role, epoch: int) -> list[int]:
        cached = self._orders.get(role)
        if cached is None or cached[0] != epoch:
            # Sorting by `random()` instead of `shuffle`: only the former is promised to be the same in every Python
            # version.
            generator = random.Random(f"{self.seed}:{role}:{epoch}")
            order = _shuffled(range(len(self.sets[role])), generator)
            if self.group_by_length:
                # Micro-batches run on across epochs: the first examples of this one may complete the last batch of the
                # one before.
                size = self.sizes.of(role)
                order = _grouped(order, self._lengths[role], size, -epoch * len(order) % size, generator)
            cached = (epoch, order)
            self._orders[role] = cached
        return cached[1]


def _shuffled(items: Iterable[T], generator: random.Random) -> list[T]:
    keyed = [(generator.random(), item) for item in items]
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


def _grouped(order: list[int], lengths: Seq[int], size: int, lead: int, generator: random.Random) -> list[int]:
    """Regroup a shuffled ``order`` so that its batches of ``size`` hold examples of similar length.

    The order is cut into megabatches, each sorted by length and cut into batches; then all batches of the epoch are
    shuffled, and each in itself. The ``lead`` examples that complete the batch of the epoch before, and those left over
    at the end, stay as shuffled: chosen by length they would always be the longest or the shortest.
    """
    whole = (len(order) - lead) // size * size if len(order) > lead else 0
    middle, end = order[lead : lead + whole], order[lead + whole :]
    batches: list[list[int]] = []
    for start in range(0, whole, MEGABATCH * size):
        by_length = sorted(middle[start : start + MEGABATCH * size], key=lengths.__getitem__)
        batches += [_shuffled(by_length[i : i + size], generator) for i in range(0, len(by_length), size)]
    return [*order[:lead], *(index for batch in _shuffled(batches, generator) for index in batch), *end]


def split_holdout(
    records: Mapping[Role, Seq[Record]], per_role: int, seed: int
) -> tuple[dict[Role, list[Record]], dict[Role, list[Record]]]:
    """``(training, held_out)`` with ``per_role`` held-out records per non-empty role, chosen by seed and text, not by
    file order.

    Disjoint by prompt: every record of any role that shares its first request with a held-out one leaves training too.
    Raises ``UserError`` when a role would have nothing left to train on.
    """
    held: dict[Role, list[Record]] = {}
    prompts: set[str] = set()
    for role, of_role in records.items():
        ranked = sorted(of_role, key=lambda record: (choice_key(seed, record), record.origin))
        held[role] = ranked[:per_role]
        prompts.update(_first_request(r) for r in held[role])
    training: dict[Role, list[Record]] = {}
    for role, of_role in records.items():
        training[role] = [r for r in of_role if _first_request(r) not in prompts]
        if of_role and not training[role]:
            raise UserError(
                f"validation.holdout={per_role} leaves no `{role}` record to train on (there are {len(of_role)}); "
                "lower it or give validation.sources"
            )
    return training, held


def choice_key(seed: int, record: Record) -> bytes:
    """A pseudo-random rank of a record: from seed and text alone, so that a choice by rank does not depend on any
    file's order.
    """
    return hashlib.blake2b(json.dumps([seed, *record.content]).encode(), digest_size=16).digest()


def _first_request(record: Record) -> str:
    return next((m.content for m in record.messages if m.role == "user"), "")


def _set_lengths(examples: Seq[Encoded]) -> list[int]:
    """A length per example, in tokens or in the set's own unit; of a pair the longer answer's."""
    own = getattr(examples, "lengths", None)
    if own is not None:
        return list(own())
    return [max(len(e.unsafe), len(e.safe)) if isinstance(e, PairSequence) else len(e) for e in examples]


def _set_fingerprint(examples: Seq[Encoded]) -> str:
    own = getattr(examples, "fingerprint", None)
    if own is not None:
        return str(own())
    digest = hashlib.sha256()
    for example in examples:
        parts = (example.unsafe, example.safe) if isinstance(example, PairSequence) else (example,)
        digest.update(json.dumps([[p.prompt_length, p.ids, *p.earlier] for p in parts]).encode())
    return digest.hexdigest()
