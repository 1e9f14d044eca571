"""Length-grouped sampling: a permutation per epoch, no length earlier than another, less padding, and resumable."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from statistics import fmean

import pytest

from repbend_fast.data.encoded import encode_records
from repbend_fast.data.records import BatchSizes, Message, PairSequence, Record, Sequence
from repbend_fast.data.sampling import BatchSampler
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError

EXAMPLES = 4


def published_lengths(count: int, role: str, seed: int = 5) -> list[tuple[int, int]]:
    """(prompt, answer) tokens as published: log-normal with median 75 and σ 0.6, cut to 512 each; retain uniform in 350
    … 1024.
    """
    draw = random.Random(f"{seed}:{role}")
    if role == "retain":
        return [(0, draw.randint(350, 1024)) for _ in range(count)]
    return [tuple(min(512, max(2, round(draw.lognormvariate(math.log(75), 0.6)))) for _ in "pa") for _ in range(count)]


def sequences(lengths: Iterable[tuple[int, int]]) -> list[Sequence]:
    """One sequence per length; its first id tells it from all others."""
    return [Sequence((i, *([7] * (p + a - 1))), p) for i, (p, a) in enumerate(lengths)]


def sampler(count: int = 403, *, examples: int = EXAMPLES, seed: int = 3, grouped: bool = True) -> BatchSampler:
    sets = {role: sequences(published_lengths(count, role)) for role in ("safe", "unsafe", "retain")}
    answers = sequences(published_lengths(count, "pair", seed=6))
    sets["pair"] = [
        PairSequence(a, b) for a, b in zip(sequences(published_lengths(count, "pair")), answers, strict=True)
    ]
    return BatchSampler(sets, BatchSizes(examples), seed, ("safe", "unsafe", "pair", "retain"), group_by_length=grouped)


def drawn(source: BatchSampler, examples: int) -> list[Sequence]:
    """The next ``examples`` safe sequences in order."""
    return [s for _ in range(examples // source.sizes.examples) for s in source.next_batch().safe]


@pytest.mark.parametrize(("count", "examples"), [(403, 4), (8, 4), (3, 4), (1, 2), (51, 1)])
def test_every_epoch_holds_every_example_once(count: int, examples: int) -> None:
    order = [s.ids[0] for s in drawn(sampler(count, examples=examples), 4 * count * examples)]
    epochs = [order[i : i + count] for i in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 8:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_role_alone() -> None:
    assert drawn(sampler(), 800) == drawn(sampler(), 800)
    assert drawn(sampler(), 400) != drawn(sampler(seed=4), 400)
    alone = BatchSampler(
        {"safe": sequences(published_lengths(403, "safe"))}, BatchSizes(EXAMPLES), 3, ("safe",), group_by_length=True
    )
    assert drawn(alone, 800) == drawn(sampler(), 800)


def correlation(x: list[float], y: list[float]) -> float:
    mx, my = fmean(x), fmean(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_no_length_comes_earlier_than_another() -> None:
    """Over 60 epochs of 403 examples in batches of 4 a fair order has a correlation of 0 ± 0.013 (1/√(60 · 403/4))."""
    source, count, epochs = sampler(), 403, 60
    order = drawn(source, epochs * count)
    positions = [float(i % count) for i in range(len(order))]
    assert abs(correlation([float(len(s)) for s in order], positions)) < 0.05
    # Also within a batch, and at the ends of an epoch, where examples that fill no whole batch lie.
    within = [float(i % EXAMPLES) for i in range(len(order))]
    assert abs(correlation([float(len(s)) for s in order], within)) < 0.03
    usual = fmean(len(s) for s in order)
    ends = [len(s) for i, s in enumerate(order) if i % count < 3 or i % count >= count - 3]
    assert abs(fmean(ends) / usual - 1) < 0.12


def test_the_statistic_sees_an_unfair_order() -> None:
    by_length = sorted(sampler().sets["safe"], key=len)
    assert correlation([float(len(s)) for s in by_length], [float(i) for i in range(len(by_length))]) > 0.5
    sorted_batches = [s for i in range(0, 400, 4) for s in sorted(drawn(sampler(), 400)[i : i + 4], key=len)]
    assert correlation([float(len(s)) for s in sorted_batches], [float(i % 4) for i in range(400)]) > 0.03


def waste(source: BatchSampler, batches: int) -> float:
    """Share of padding when each role of a micro-batch is padded to its longest sequence."""
    filled = padded = 0
    for _ in range(batches):
        batch = source.next_batch()
        for of_role in (batch.safe, batch.unsafe, [p.safe for p in batch.pairs], batch.retain):
            filled += sum(len(s) for s in of_role)
            padded += len(of_role) * max(len(s) for s in of_role)
    return 1 - filled / padded


def test_padding_falls_on_the_published_lengths(record_property: Callable[[str, object], None]) -> None:
    shuffled, grouped = (waste(sampler(4000, grouped=on), 500) for on in (False, True))
    record_property("padding", {"shuffled": round(shuffled, 4), "grouped": round(grouped, 4)})
    print(f"padding: {shuffled:.1%} shuffled, {grouped:.1%} grouped by length")
    assert shuffled > 0.2
    assert grouped < 0.1


@pytest.mark.parametrize("taken", [0, 1, 99, 101, 250])
def test_resuming_gives_the_same_batches(taken: int) -> None:
    source = sampler()
    drawn(source, taken * EXAMPLES)
    resumed = sampler()
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert drawn(resumed, 600) == drawn(source, 600)


def test_resuming_with_the_other_order_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"cannot resume: data\.group_by_length=False, but the checkpoint was written with True; set it back",
    ):
        sampler(grouped=False).load_state_dict(sampler().state_dict())
    older = sampler(grouped=False).state_dict()
    del older["group_by_length"]
    sampler(grouped=False).load_state_dict(older)
    with pytest.raises(UserError, match=r"data\.group_by_length=True, but the checkpoint was written with False"):
        sampler().load_state_dict(older)


def test_lazy_records_are_grouped_without_encoding_them(make_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(make_tokenizer(), 60, 60)
    texts = ["yes " * n for n in (1, 30, 2, 29, 3, 28, 1, 30)]
    records = {"safe": [Record("safe", (Message("user", "How?"),), text) for text in texts]}
    encoded = encode_records(records, encoder)
    with monkeypatch.context() as patch:
        patch.setattr(ChatEncoder, "encode", lambda *_, **__: pytest.fail("encoded while grouping"))
        source = BatchSampler(encoded, BatchSizes(4), 3, ("safe",), group_by_length=True)
    for _ in range(4):
        lengths = [len(s) - s.prompt_length for s in source.next_batch().safe]
        assert max(lengths) < 20 or min(lengths) > 20


def test_retain_has_epochs_of_its_own_batches() -> None:
    sets = {"safe": sequences(published_lengths(51, "safe")), "retain": sequences(published_lengths(51, "retain"))}
    source = BatchSampler(sets, BatchSizes(2, retain=5), 3, ("safe", "retain"), group_by_length=True)
    taken = [source.next_batch() for _ in range(102)]
    order = [s.ids[0] for batch in taken for s in batch.retain]
    assert all(sorted(order[i : i + 51]) == list(range(51)) for i in range(0, 510, 51))
    # Mixed by chance a batch of five spans two thirds of the range of lengths.
    assert sum(max(map(len, b.retain)) - min(map(len, b.retain)) for b in taken) / len(taken) < 200
