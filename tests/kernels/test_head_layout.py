"""How the head ops lay out a chunk of logits: whole tiles of rows, aligned rows, and a gradient packed over what has
been read.
"""

from __future__ import annotations

import pytest
import torch
from kernel_compare import spread
from repbend_kernels import head, linear_kl_div, linear_log_prob
from repbend_kernels.head import CHUNK_BYTES, TILE_ROWS, default_chunk_rows, head_chunks, largest_chunk, logit_buffers

SHAPES = [(27, 8), (27, 8), (40, 8)]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("vocabulary", [32000, 49152, 128256, 152064, 256000, 10_000_000])
def test_a_chunk_is_whole_tiles_within_its_bytes(device: str, vocabulary: int) -> None:
    tile, limit = (table["cuda" if device == "cuda" else "other"] for table in (TILE_ROWS, CHUNK_BYTES))
    rows = default_chunk_rows(1 << 20, vocabulary, torch.device(device))
    assert rows % tile == 0
    assert rows == tile or 4 * rows * vocabulary <= limit < 4 * (rows + tile) * vocabulary
    assert default_chunk_rows(5, vocabulary, torch.device(device)) == 5
    assert default_chunk_rows(0, vocabulary, torch.device(device)) == 1


@pytest.mark.parametrize(
    ("rows", "step", "chunks", "largest"),
    [
        (2623, 512, 5, 575),
        (2560, 512, 5, 512),
        (2688, 512, 6, 512),
        (63, 512, 1, 63),
        (600, 128, 5, 128),
        (0, 512, 0, 0),
    ],
)
def test_a_short_tail_goes_with_the_last_chunk(rows: int, step: int, chunks: int, largest: int) -> None:
    """A tail of a tile or more, or of more than a quarter of a chunk, stays one of its own."""
    found = head_chunks(rows, step, torch.device("cuda"))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    assert (len(found), largest_chunk(found)) == (chunks, largest)


@pytest.mark.parametrize("op", ["kl", "log prob"])
def test_a_short_tail_reads_the_weight_no_more_often(monkeypatch, op: str) -> None:
    hidden, other, weight = (spread(shape, torch.float32, torch.device("cpu"), i) for i, shape in enumerate(SHAPES))
    products: list[int] = []
    plain = head.hidden_gradient
    monkeypatch.setattr(
        head, "hidden_gradient", lambda grad, *rest: products.append(grad.shape[0]) or plain(grad, *rest)
    )
    leaf = hidden.requires_grad_()
    if op == "kl":
        linear_kl_div(leaf, other, weight, chunk_rows=12, implementation="torch").backward()
    else:
        linear_log_prob(leaf, weight, torch.arange(27), chunk_rows=12, implementation="torch").sum().backward()
    assert products == [12, 15]


def test_copies_that_autocast_makes_are_counted() -> None:
    rows, vocabulary, width = 300, 1000, 64
    for device, itemsize, more in (("cuda", 4, 2 * width * (vocabulary + 2 * rows)), ("cuda", 2, 0), ("cpu", 4, 0)):
        plain, cast = (
            head.head_scratch(rows, vocabulary, width, itemsize, torch.device(device), None, autocast=autocast)
            for autocast in (False, True)
        )
        assert cast - plain == more


@pytest.mark.parametrize("vocabulary", [128256, 32001, 7])
def test_rows_of_a_packed_gradient_are_aligned(vocabulary: int) -> None:
    """cuBLAS' fast kernels need rows at multiples of 16 bytes, whatever the vocabulary is."""
    for buffer in logit_buffers(2, 3, vocabulary, torch.float32, torch.device("cpu")):
        packed = buffer.view(torch.bfloat16)[:, :vocabulary]
        assert packed.shape == buffer.shape == (3, vocabulary)
        for rows in (buffer, packed):
            assert rows.stride(0) * rows.element_size() % 16 == 0
            assert rows.stride(1) == 1
        assert packed[2].data_ptr() == buffer[2].data_ptr()


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 63, 125])
def test_nothing_is_packed_over_what_a_slow_warp_has_not_read(monkeypatch, blocks: int) -> None:
    """16-bit block k ends at float32 element (k + 1)/2 · block: all float32 blocks that begin before it must have been
    read by everyone.
    """
    parts = pytest.importorskip("repbend_kernels.triton.parts", reason="the kernels need Triton")
    barriers: list[int] = []
    written = -1
    for block in range(blocks):
        monkeypatch.setattr(parts.tl, "debug_barrier", lambda block=block: barriers.append(block))
        written = parts.packing_barrier.fn(block, written)
        last_overwritten = -(-(block + 1) // 2) - 1
        assert last_overwritten <= barriers[-1]
        assert block <= written
    assert len(barriers) <= max(1, blocks.bit_length())
