"""Decoding gives what transformers' ``generate`` gives on plain left-padded rows, and does less for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import tiny_of
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from repbend_fast.evaluation.decoding import ROWS_WORTH_LEAVING, common_beginning, new_tokens, padded
from repbend_fast.evaluation.kv_cache import ROOM, RoomyLayer, padding_is_unseen, roomy_cache, rows_can_leave
from repbend_fast.models.layers.switches import weights_cast_once

CPU = torch.device("cpu")
NEW = 12


def rows(shared: int = 40, count: int = 10, vocabulary: int = 90) -> list[list[int]]:
    """Rows of several lengths that begin with the same tokens."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(8, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    beginning = draw(shared)
    return [beginning + draw(2 + i % 5) for i in range(count)]


def library(model: Any, encoded: list[list[int]]) -> list[list[int]]:
    ids, mask = padded(encoded, 0)
    with torch.inference_mode():
        return model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()


def ours(model: Any, encoded: list[list[int]]) -> list[list[int]]:
    with torch.inference_mode():
        return new_tokens(model, encoded, CPU)


def settle(model: Any, ends: list[int] | None) -> None:
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, use_cache=True, eos_token_id=ends, pad_token_id=0
    )


def frequent(answers: list[list[int]], count: int = 3) -> list[int]:
    """Tokens that end some of the answers early."""
    found = [token for answer in answers for token in answer]
    return sorted(set(found), key=found.count)[-count:]


def until_end(answers: list[list[int]], ends: list[int]) -> list[list[int]]:
    return [next((a[: i + 1] for i, token in enumerate(a) if token in ends), a) for a in answers]


def sharpened(model: Any) -> Any:
    """Weights of the usual size give one flat distribution; larger ones make the answers depend on the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


@pytest.fixture
def llama() -> Any:
    return sharpened(tiny_of("llama"))


# Full attention; windows, by the cache and by the model itself; softcaps; latent keys; positions of the model's own;
# recurrent states, alone and beside attention; mixtures of experts; no cache at all.
FAMILIES = {
    "llama": "all",
    "gpt2": "all",
    "opt": "all",
    "phi3": "all",
    "deepseek_v3": "all",
    "mixtral": "all",
    "falcon": "all",
    "gpt_neo": "rows",
    "bloom": "rows",
    "mpt": "rows",
    "mistral": "rows",
    "gemma2": "rows",
    "gemma3_text": "rows",
    "gpt_oss": "rows",
    "bamba": "kept",
    "qwen3_next": "kept",
    "mamba": "own",
    "openai-gpt": "own",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_answers_as_with_the_library_alone(family: str):
    model, encoded = sharpened(tiny_of(family)), rows()
    settle(model, None)
    ends = frequent(library(model, encoded))
    settle(model, ends)
    want = until_end(library(model, encoded), ends)
    assert len({len(answer) for answer in want}) > 1, "the test needs answers of several lengths"
    assert until_end(ours(model, encoded), ends) == want

    cache = roomy_cache(model, 60)
    shortcuts = "own"
    if cache is not None:
        shortcuts = "rows" if rows_can_leave(cache) else "kept"
        shortcuts = "all" if padding_is_unseen(model, cache) else shortcuts
    assert shortcuts == FAMILIES[family]


def passes(model: Any, work: Any) -> list[tuple[int, int]]:
    """Rows and columns of every pass through the embedding."""
    found: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape))
    try:
        work()
    finally:
        handle.remove()
    return [tuple(shape) for shape in found]


def test_a_common_beginning_runs_once(llama):
    encoded = rows(shared=40, count=10)
    settle(llama, None)
    own = max(map(len, encoded)) - 40
    assert passes(llama, lambda: ours(llama, encoded))[:3] == [(1, 40), (10, own), (10, 1)]


@pytest.mark.parametrize(("shared", "count"), [(3, 10), (200, 1)], ids=["short", "one row"])
def test_a_beginning_that_spares_little_has_no_pass_of_its_own(llama, shared: int, count: int):
    encoded = rows(shared, count)
    settle(llama, None)
    assert passes(llama, lambda: ours(llama, encoded))[0] == (count, max(map(len, encoded)))
    assert ours(llama, encoded) == library(llama, encoded)


def test_rows_that_have_ended_leave(llama):
    encoded = rows(count=32)
    settle(llama, None)
    ends = frequent(library(llama, encoded), 12)
    settle(llama, ends)
    want = until_end(library(llama, encoded), ends)
    assert until_end(ours(llama, encoded), ends) == want
    counts = [shape[0] for shape in passes(llama, lambda: ours(llama, encoded))[1:]]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1
    # No row is carried on for more than half of a batch that has gone.
    lengths = sorted((len(answer) for answer in want), reverse=True)
    assert all(
        count < ROWS_WORTH_LEAVING or count < 2 * sum(length > step for length in lengths)
        for step, count in enumerate(counts)
        if step
    )


def test_rows_that_are_the_same_and_a_row_alone(llama):
    settle(llama, None)
    same = [rows(count=1)[0]] * 9
    assert ours(llama, same) == library(llama, same)
    assert ours(llama, same[:1]) == library(llama, same[:1])


@pytest.mark.parametrize(
    ("encoded", "common"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[5], [6]], 0), ([[7]], 0), ([[7, 8], [7, 8]], 1)],
)
def test_every_row_keeps_a_token_of_its_own(encoded: list[list[int]], common: int):
    assert common_beginning(encoded) == common


def states(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(batch, 2, length, 6, generator=generator)


def test_a_roomy_layer_holds_what_the_librarys_holds():
    roomy, plain = RoomyLayer(most=90), DynamicLayer()
    batch = 4
    for seed, (change, length) in enumerate(
        [("", 5), ("", 1), ("select", 1), ("", 1), ("crop", 2), ("", 70), ("repeat", 1), ("", 40), ("reset", 3)]
    ):
        for layer in (roomy, plain):
            if change == "select":
                layer.batch_select_indices(torch.tensor([3, 0]))
            elif change == "crop":
                layer.crop(-3)
            elif change == "repeat":
                layer.batch_repeat_interleave(3)
            elif change == "reset":
                layer.reset()
        batch = {"select": 2, "repeat": 6}.get(change, batch)
        new = states(seed, batch, length)
        for ours_, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours_, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length()


def test_a_roomy_layer_copies_its_past_once_for_many_tokens_and_takes_no_more_than_it_needs():
    layer = RoomyLayer(most=10 + 2 * ROOM)
    storages = []
    for step in range(2 * ROOM + 1):
        keys, _ = layer.update(*states(step, 2, 10 if step == 0 else 1))
        storages.append(keys.untyped_storage().data_ptr())
        assert keys.untyped_storage().nbytes() <= 2 * 2 * (10 + 2 * ROOM) * 4 * keys.element_size()
    assert len(set(storages)) == 2


class Layers(nn.Module):
    """Two frozen layers, one that is trained, and one that shares its weight with an embedding."""

    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.frozen, self.trained, self.head = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head.weight = self.embedding.weight
        self.requires_grad_(False)
        self.trained.requires_grad_(True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.trained(self.frozen(self.embedding(ids))))


def test_weights_are_cast_once_and_put_back():
    torch.manual_seed(0)
    layers, ids = Layers(), torch.arange(8)
    own = dict(layers.named_parameters(remove_duplicate=False))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        want = layers(ids)
        with weights_cast_once(layers):
            assert layers.frozen.weight.dtype == layers.head.weight.dtype == torch.bfloat16
            assert layers.embedding.weight.dtype == layers.trained.weight.dtype == torch.float32
            assert torch.equal(layers(ids), want)
        with pytest.raises(ZeroDivisionError), weights_cast_once(layers):
            raise ZeroDivisionError
    after = dict(layers.named_parameters(remove_duplicate=False))
    assert {name: id(weight) for name, weight in after.items()} == {name: id(weight) for name, weight in own.items()}


def test_weights_stay_where_nothing_casts_them():
    layers = Layers()
    with weights_cast_once(layers):
        assert layers.frozen.weight.dtype == torch.float32
