"""Attention among sequences that share a row: each as if it were alone, by SDPA or by torch's varlen kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from other_families import other_model
from tiny_models import BLOCKS, FAMILIES, VOCABULARY, objective_config, ragged_batch, runner_on, tiny_model, wrap
from torch import Tensor
from transformers import masking_utils
from transformers.models.llama.modeling_llama import LlamaAttention

from repbend_fast.config import Config
from repbend_fast.config.schema import MemoryConfig, ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, prepared, run_decoder, use_low_rank_forward
from repbend_fast.models.layers import varlen
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.packing import Packed, pack
from repbend_fast.models.layers.varlen import MASKED, NAMES, attention_of, use_masks, use_varlen, varlen_attention
from repbend_fast.objectives import build_objective
from repbend_fast.step import checked
from repbend_fast.step.levers import Levers, default_levers, levers_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (13, 8, 3)
WINDOW = 5
IDS = torch.randint(3, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


def states(model: Any, ids: Tensor, packed: Packed | None = None, stop: int = BLOCKS) -> list[Tensor]:
    found: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    with torch.no_grad():
        run_decoder(find_decoder(model), ids[None], packed=packed, stop=stop, visit=visit)
    return [hidden[0] for hidden in found]


def alone(model: Any, stop: int = BLOCKS) -> list[Tensor]:
    """The hidden states of each sequence in a pass of its own, one behind the other."""
    each = [states(model, part, stop=stop) for part in IDS.split(LENGTHS)]
    return [torch.cat(layers) for layers in zip(*each)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    """Its name, a prepared model, and what the model gave before it was prepared."""
    model = wrap(tiny_model(request.param))
    expected = alone(model)
    before = find_decoder(model).body.config._attn_implementation
    with prepared(model, Levers()):
        assert find_decoder(model).body.config._attn_implementation == NAMES[before]
        yield request.param, model, expected
    assert find_decoder(model).body.config._attn_implementation == before


def assert_alone(found: list[Tensor], expected: list[Tensor]) -> None:
    for layer, (got, states) in enumerate(zip(found, expected, strict=True)):
        assert_matches(got, states, tolerance=1e-5, name=f"hidden state {layer}")


def test_packed_is_alone(family: Any) -> None:
    _, model, expected = family
    assert_alone(states(model, IDS, pack(LENGTHS, CPU)), expected)
    assert_alone(alone(model), expected)


def test_a_family_whose_own_masks_know_no_packing() -> None:
    """And whose attention has sinks, so that it stays in plain torch."""
    model = other_model("gpt_oss")
    blocks = find_decoder(model).num_blocks
    expected = alone(model, blocks)
    assert relative_l2(states(model, IDS, pack(LENGTHS, CPU), blocks)[-1], expected[-1]) > 1e-2
    use_varlen(find_decoder(model).body, CPU, Changes())
    assert_alone(states(model, IDS, pack(LENGTHS, CPU), blocks), expected)


def test_by_masks_packed_is_alone_too(family: Any) -> None:
    _, model, expected = family
    changes = Changes()
    use_masks(find_decoder(model).body, changes)
    try:
        assert_alone(states(model, IDS, pack(LENGTHS, CPU)), expected)
        assert_alone(alone(model), expected)
    finally:
        changes.undo()


def test_a_family_that_does_not_hand_on_what_attention_is_told_gets_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = LlamaAttention.forward

    def deaf(self: Any, *args: Any, packed: Packed | None = None, **others: Any) -> Any:
        return attend(self, *args, **others)

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    model = wrap(tiny_model())
    for asked, levers in (("auto", Levers(packing="on")), ("on", Levers(packing="on")), ("off", Levers())):
        config = Config.model_construct(memory=MemoryConfig(packing=asked), model=ModelConfig(name="tiny"))
        monkeypatch.setattr(checked, "autocast_dtype", lambda config, device: None)
        ours = checked.checked_runner(model, config, levers, uses_head=False)
        assert ours.levers.packing == levers.packing
        named = find_decoder(model).body.config._attn_implementation
        assert named == (MASKED if levers.packing == "on" else NAMES["sdpa"])
        ours.prepared.restore()


def test_what_generation_asks_for_is_unchanged(family: Any) -> None:
    """A mask of padding on the left, as a batch of prompts has it. The adapter's products are the same on both sides,
    so that only attention could differ.
    """
    name, model, _ = family
    ids = torch.stack([torch.cat([torch.zeros(5, dtype=torch.int64), IDS[13:21]]), IDS[:13]])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    bare = wrap(tiny_model(name))
    use_low_rank_forward(bare)
    with torch.no_grad():
        expected, got = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (bare, model))
    assert torch.equal(got[mask.bool()], expected[mask.bool()])


class Kernel:
    """Stands for torch's kernel: notes what it is asked, and computes it over the whole row with one mask."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls.append(
            {
                "shapes": (tuple(query.shape), tuple(key.shape), tuple(value.shape)),
                "bounds": (cu_seq_q.tolist(), cu_seq_k.tolist(), cu_seq_q.dtype),
                "longest": (max_q, max_k),
                "window": window_size,
                "gqa": enable_gqa,
                "scale": scale,
            }
        )
        number = torch.bucketize(torch.arange(len(query)), cu_seq_q[1:], right=True)
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))[None, :]
        mask = (number[:, None] == number[None, :]) & (behind >= 0)
        if window_size[0] >= 0:
            mask &= behind <= window_size[0]
        assert window_size[1] == 0
        parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return out[0].transpose(0, 1)


def test_the_kernel_is_asked_for_all_sequences_at_once(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, model, expected = family
    kernel = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "takes_kernel", lambda query, key, value: True)
    assert_alone(states(model, IDS, pack(LENGTHS, CPU)), expected)
    if name == "gemma2":  # its soft-cap stays with the attention in plain torch
        assert kernel.calls == []
        return
    assert len(kernel.calls) == BLOCKS
    total = sum(LENGTHS)
    for call in kernel.calls:
        assert call["shapes"] == ((total, 4, 16), (total, 2, 16), (total, 2, 16))
        assert call["bounds"] == ([0, 13, 21, 24], [0, 13, 21, 24], torch.int32)
        assert (call["longest"], call["gqa"], call["scale"]) == ((13, 13), True, 0.25)
    full, window = (-1, 0), (WINDOW - 1, 0)
    of_family = {"mistral": [window] * 4, "phi3": [window] * 4, "qwen2": [full, full, window, window]}
    mixed = {"gemma3": [window, full] * 2}
    assert [call["window"] for call in kernel.calls] == (of_family | mixed).get(name, [full] * 4)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_no_step_asks_transformers_for_the_sequences_of_a_row(
    family: Any, packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That reads positions on the device, for which the host would wait."""
    _, model, _ = family
    asked: list[object] = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids))
    ours = runner_on(model, levers_of(MemoryConfig(packing=packing, merge_streams="on"), model))
    ours.backward_all(build_objective(objective_config(), BLOCKS).streams(ragged_batch(), 0), dropout_seed=1)
    assert asked == []
    model.zero_grad(set_to_none=True)


def ask(packed: Packed | None, mask: Tensor | None = None, module: Any = None, **others: Any) -> Tensor:
    parts = [torch.randn(1, heads, 6, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    return varlen_attention(module or torch.nn.Identity(), *parts, mask, scaling=0.3, packed=packed, **others)[0]


@pytest.mark.parametrize("what", ["softcap", "s_aux", "position_bias"])
def test_attention_that_the_kernel_does_not_know_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=f"attention with {what} has no path"):
        ask(pack((4, 2), CPU), **{what: torch.ones(1)})


def test_a_mask_without_a_window_is_refused() -> None:
    """Else a family that masks in a way of its own would be computed without it."""
    with pytest.raises(ValueError, match="a mask of its own"):
        ask(pack((4, 2), CPU), torch.ones(1, 6, dtype=torch.bool))
    window = ask(pack((4, 2), CPU), torch.ones(1, 6, dtype=torch.bool), module=SimpleNamespace(sliding_window=2))
    assert not torch.equal(window, ask(pack((4, 2), CPU), sliding_window=2)), "without a mask there is no window"


def tensor(dtype: torch.dtype = torch.bfloat16, width: int = 128, cuda: bool = True) -> Any:
    return SimpleNamespace(dtype=dtype, shape=(1, 4, 9, width), is_cuda=cuda, device=CUDA)


@pytest.mark.parametrize(
    ("values", "card", "taken"),
    [
        ({}, (8, 0), True),
        ({"dtype": torch.float16}, (12, 0), True),
        ({"width": 256}, (9, 0), True),
        ({"width": 264}, (9, 0), False),
        ({"width": 100}, (9, 0), False),
        ({"dtype": torch.float32}, (9, 0), False),
        ({"cuda": False}, (9, 0), False),
        ({}, (7, 5), False),
    ],
)
def test_which_tensors_the_kernel_takes(values: Any, card: Any, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    query = tensor(**values)
    assert varlen.takes_kernel(query, query, query) is taken
    assert not varlen.takes_kernel(query, query, tensor(width=64))
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert not varlen.takes_kernel(query, query, query)


@pytest.mark.parametrize(
    ("family_name", "dtype", "device", "packing"),
    [
        ("llama", torch.bfloat16, CUDA, "on"),
        ("mistral", torch.float16, CUDA, "on"),
        ("llama", torch.float32, CUDA, "off"),
        ("gemma2", torch.bfloat16, CUDA, "off"),
        ("gemma2", torch.float32, CPU, "on"),
    ],
)
def test_rows_are_packed_where_there_is_a_kernel(family_name: str, dtype: Any, device: Any, packing: str) -> None:
    model = tiny_model(family_name, dtype)
    attention = attention_of(find_decoder(model).body, model.get_input_embeddings().weight, device)
    assert default_levers(MemoryConfig(), BLOCKS, device, attention).packing == packing
    assert default_levers(MemoryConfig(packing="off"), BLOCKS, device, attention).packing == "off"


def test_heads_with_two_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = SimpleNamespace(_attn_implementation="sdpa", model_type="wide")
    body: Any = torch.nn.Sequential(torch.nn.Identity())
    body.config, body._supports_attention_backend, body[0].head_dim = config, True, 200
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match=r"heads of 200 values .* set model\.attention=eager"):
        use_varlen(body, CUDA, Changes())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    use_varlen(body, CUDA, Changes())
    assert config._attn_implementation == NAMES["sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, WINDOW])
def test_torch_s_kernel_gives_what_sdpa_gives(window: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = pack((70, 33, 1, 129), CUDA)
    shapes = ((1, 8, 233, 64), (1, 2, 233, 64), (1, 2, 233, 64))
    parts = [torch.randn(shape, generator=generator).to(CUDA, torch.bfloat16).requires_grad_() for shape in shapes]
    weight = torch.randn(1, 233, 8, 64, generator=generator).to(CUDA, torch.bfloat16)
    found = []
    for compute in (varlen._by_kernel, varlen._one_by_one):
        out = compute(*parts, packed, 0.125, window)
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), parts)])
    for name, got, expected in zip(("output", "query", "key", "value"), *found, strict=True):
        assert_matches(got, expected, tolerance=2e-2, name=name)


@pytest.mark.parametrize("autocast", [False, True], ids=["16-bit tensors", "autocast"])
@pytest.mark.parametrize("shared", [0, 4])
def test_short_rows_of_a_cpu_are_computed_in_32_bits(
    shared: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back, and the gradients, are those of float32 rounded once, for a sequence on its own too; longer
    rows go as they are.
    """
    packed = pack((7, 9, 4) if shared == 0 else (3, 9, 4), CPU, shared)
    rows = sum(packed.lengths) + shared
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, heads, rows, 8, generator=draw).bfloat16() for heads in (4, 2, 2)]
    weight = torch.randn(1, rows, 4, 8, generator=draw)

    def found(dtype: torch.dtype, cast: bool) -> tuple[torch.dtype, list[Tensor]]:
        parts = [part.detach().to(dtype, copy=True).requires_grad_() for part in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, _ = varlen_attention(SimpleNamespace(is_causal=True), *parts, None, packed=packed)  # type: ignore[arg-type]
        (out.float() * weight).sum().backward()
        return out.dtype, [out.detach(), *(part.grad for part in parts if part.grad is not None)]

    dtype, got = found(torch.float32 if autocast else torch.bfloat16, autocast)
    _, exact = found(torch.float32, False)
    assert dtype == torch.bfloat16
    assert torch.equal(got[0], exact[0].bfloat16())
    for name, ours, wanted in zip("qkv", got[1:], exact[1:], strict=True):
        assert relative_l2(ours, wanted) < 4e-3, name
    if not shared:
        alone = []
        for rows_of in (slice(0, 7), slice(7, 16), slice(16, 20)):
            parts = [part[:, :, rows_of].to(torch.float32 if autocast else torch.bfloat16) for part in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
                alone.append(varlen_attention(module, *parts, None)[0])  # type: ignore[arg-type]
        assert torch.equal(torch.cat(alone, 1), got[0]), "a sequence on its own is computed otherwise"
    monkeypatch.setattr(varlen, "WIDENED", 0)
    assert not torch.equal(found(torch.float32 if autocast else torch.bfloat16, autocast)[1][0], got[0])
