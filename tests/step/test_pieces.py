"""How sequences are grouped and laid out, and which rows of a piece belong to which span."""

from __future__ import annotations

import pytest
import torch
from tiny_models import runner_on, sequence, tiny_model, wrap

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.step.levers import Levers, levers_of
from repbend_fast.step.pieces import make_piece, split

CPU = torch.device("cpu")
SEQUENCES = tuple(sequence(2, n - 2, n) for n in (5, 9, 3, 9, 4))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("tokens", [None, 1, 9, 12, 18, 1000])
def test_every_sequence_is_in_one_piece_that_fits(layout, tokens) -> None:
    groups = split(SEQUENCES, tokens, layout)
    assert sorted(m for g in groups for m in g) == [0, 1, 2, 3, 4]
    for group in groups:
        lengths = [len(SEQUENCES[m]) for m in group]
        size = sum(lengths) if layout == "packed" else max(lengths) * len(lengths)
        assert len(group) == 1 or tokens is None or size <= tokens
    assert groups == sorted(groups, key=lambda g: -len(SEQUENCES[g[0]]))
    if tokens in (None, 1000):
        assert len(groups) == 1
    if tokens == 1:
        assert len(groups) == len(SEQUENCES)
    assert split((), tokens, layout) == []


def test_packing_fits_more_than_padding() -> None:
    assert len(split(SEQUENCES, 12, "packed")) < len(split(SEQUENCES, 12, "padded"))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rows_find_their_tokens(layout) -> None:
    members = (3, 0, 2)
    piece = make_piece(SEQUENCES, members, layout, CPU)
    assert piece.tokens == 9 + 5 + 3
    spans = ((1, 4), (0, 0), (2, 3), (0, 9), (1, 2))
    expected = [*SEQUENCES[3].ids, *SEQUENCES[0].ids[1:4], SEQUENCES[2].ids[2]]
    assert piece.input_ids.flatten()[piece.rows(spans)].tolist() == expected
    apart = (spans[0], spans[1], (0, 1, 2, 3), (0, 2, 2, 3, 7, 9), spans[4])
    expected = [*(SEQUENCES[3].ids[i] for i in (0, 1, 2, 7, 8)), *SEQUENCES[0].ids[1:4], *SEQUENCES[2].ids[::2]]
    assert piece.input_ids.flatten()[piece.rows(apart)].tolist() == expected
    if layout == "packed":
        assert piece.input_ids.shape == (1, 17)
        assert piece.packed.position_ids.tolist() == [[*range(9), *range(5), *range(3)]]
        assert piece.packed.bounds.tolist() == [0, 9, 14, 17]
        assert (piece.packed.lengths, piece.packed.longest) == ((9, 5, 3), 9)
    else:
        assert piece.input_ids.shape == (3, 9)
        assert piece.packed is None


def test_a_piece_of_one_sequence_has_no_positions() -> None:
    piece = make_piece(SEQUENCES, (1,), "packed", CPU)
    assert piece.input_ids.tolist() == [list(SEQUENCES[1].ids)]
    assert piece.packed is None


def test_no_rows() -> None:
    piece = make_piece(SEQUENCES, (1, 2), "packed", CPU)
    assert piece.rows(((0, 0),) * 5).shape == (0,)


def test_layout_and_checkpointing_follow_the_settings() -> None:
    model = wrap(tiny_model())
    runner = runner_on(model, levers_of(MemoryConfig(), model))
    assert (runner.layout, runner.levers.checkpoint_blocks) == ("packed", 0)
    runner = runner_on(model, levers_of(MemoryConfig(packing="off", checkpoint_blocks="all"), model))
    assert (runner.layout, runner.levers.checkpoint_blocks) == ("padded", 4)
    assert runner_on(model, Levers(packing="on"), uses_head=False).head is None


def test_head_chunks_reach_the_op(monkeypatch) -> None:
    from repbend_fast.objectives import HeadKL, Stream
    from repbend_fast.step.terms import head_kl

    seen: list[int | None] = []
    real = head_kl.linear_kl_div
    monkeypatch.setattr(
        head_kl, "linear_kl_div", lambda *args, **kwargs: (seen.append(kwargs["chunk_rows"]), real(*args, **kwargs))[1]
    )
    stream = Stream("retain", SEQUENCES[:1], (HeadKL("kl", ((0, 5),), 1.0, 1.0, 2.0),))
    for rows in (3, None):
        runner_on(wrap(tiny_model()), Levers(kl_chunk_rows=rows)).measure(stream)
    assert seen == [3, None]
