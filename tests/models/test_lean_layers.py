"""Lean norms and MLPs: the values of the model's own layers, the gradients, and less kept for backward."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, spread
from repbend_kernels import chunks, gated_product, rms_norm
from repbend_kernels.gated_product import gated_product_gradients, gated_product_op
from repbend_kernels.rms_norm import rms_norm_gradient, rms_norm_op
from tiny_models import (
    BLOCKS,
    FAMILIES,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    run_step,
    runner_on,
    tiny_model,
    wrap,
)
from torch import Tensor
from torch.nn import functional as F

from repbend_fast.config.schema import LoraConfig, MemoryConfig
from repbend_fast.models import find_decoder, surgery
from repbend_fast.models.layers import liger, recompute
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.lean import use_lean_layers
from repbend_fast.models.layers.lora import use_low_rank_forward
from repbend_fast.models.layers.recompute import Recomputation, origin_of, recomputable
from repbend_fast.objectives import build_objective
from repbend_fast.step.levers import Levers

D, INNER, TOKENS = 64, 128, 12
# One rounding to bfloat16 of the result, and of what is rounded on the way.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
DROPOUT = LoraConfig(r=3, alpha=6, dropout=0.2)
CONFIG = objective_config(alpha_mode="all", loss_mode="prompt_response")


@pytest.fixture(params=[1 << 17, 3 * D], ids=["one chunk", "small chunks"])
def chunk(request, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CPU_CHUNK_ELEMENTS", request.param)


def values(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return spread(shape, dtype, torch.device("cpu"), seed)


def double_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (1 + weight if gemma else weight)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_against_float64(chunk, dtype, gemma) -> None:
    x = values(2, 7, D, seed=0, dtype=dtype).requires_grad_()
    weight, grad = values(D, seed=1, dtype=dtype), values(2, 7, D, seed=2, dtype=dtype)
    out = rms_norm(x, weight, 1e-5, gemma)
    out.backward(grad)
    exact_x = x.detach().double().requires_grad_()
    exact = double_norm(exact_x, weight.double(), 1e-5, gemma)
    exact.backward(grad.double())
    assert out.dtype == x.grad.dtype == dtype
    assert_matches(out.double(), exact, tolerance=TOLERANCE[dtype])
    assert_matches(x.grad.double(), exact_x.grad, tolerance=TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5, gemma), out)


@pytest.mark.parametrize("layout", ["contiguous", "halves"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gated_product_against_float64(chunk, dtype, activation, layout) -> None:
    both = values(2, 7, 2 * INNER, seed=3, dtype=dtype).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    if layout == "contiguous":
        gate, up = gate.contiguous(), up.contiguous()
    grad = values(2, 7, INNER, seed=4, dtype=dtype)
    out = gated_product(gate, up, activation)
    out.backward(grad)
    exact_both = both.detach().double().requires_grad_()
    gate, up = exact_both.chunk(2, dim=-1)
    exact = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    exact.backward(grad.double())
    assert out.dtype == both.grad.dtype == dtype
    assert_matches(out.double(), exact, tolerance=TOLERANCE[dtype])
    for half, expected in zip(both.grad.chunk(2, -1), exact_both.grad.chunk(2, -1)):
        assert_matches(half.double(), expected, tolerance=TOLERANCE[dtype])


def test_ops_are_registered_as_torch_wants_them() -> None:
    x, weight, grad = (values(*shape, seed=5, dtype=torch.float32) for shape in ((7, D), (D,), (7, D)))
    _, scales = rms_norm_op(x, weight, 1e-5, False)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-5, False))
    torch.library.opcheck(rms_norm_gradient, (grad, x, weight, scales, False))
    torch.library.opcheck(gated_product_op, (x, grad, "silu"))
    torch.library.opcheck(gated_product_gradients, (grad, x, grad, "gelu_tanh"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_give_the_bits_of_the_model_s_own(family, dtype) -> None:
    own, lean = tiny_model(family, dtype), tiny_model(family, dtype)
    use_lean_layers(lean)
    ids = torch.arange(3, 3 + TOKENS)[None]
    assert torch.equal(lean(ids).logits, own(ids).logits)
    x = values(2, 5, D, seed=6, dtype=dtype).requires_grad_()
    for name, layer in find_decoder(own).body.named_modules():
        if type(layer).__name__.endswith(("MLP", "RMSNorm")) and (
            layer.weight.shape == (D,) if hasattr(layer, "weight") else True
        ):
            assert torch.equal(find_decoder(lean).body.get_submodule(name)(x), layer(x)), name


@pytest.mark.parametrize("blocks", [0, 2, "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_step_are_those_of_the_model_s_own_layers(family, blocks, monkeypatch) -> None:
    memory = MemoryConfig(checkpoint_blocks=blocks)
    results, gradient = run_step(wrap(tiny_model(family), lora=DROPOUT), CONFIG, memory=memory)
    monkeypatch.setattr(surgery, "use_lean_layers", lambda model, changes: None)
    expected_results, expected = run_step(wrap(tiny_model(family), lora=DROPOUT), CONFIG, memory=memory)
    for name, result in expected_results.items():
        assert_matches(results[name].loss, result.loss, tolerance=1e-6, name=name)
    for name, value in expected.items():
        assert_matches(gradient[name], value, tolerance=2e-5, name=name)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["bfloat16 model", "autocast"])
def test_gradients_in_sixteen_bits_stay_close(autocast, monkeypatch) -> None:
    def gradient() -> Tensor:
        model = wrap(tiny_model(dtype=torch.float32 if autocast else torch.bfloat16))
        objective = build_objective(CONFIG, BLOCKS)
        step = runner_on(model, Levers(packing="on", checkpoint_blocks=2), autocast=autocast)
        for stream in objective.streams(ragged_batch(), 0):
            step.backward(stream, dropout_seed=0)
        return flat(gradients(model))

    lean = gradient()
    monkeypatch.setattr(surgery, "use_lean_layers", lambda model, changes: None)
    assert_matches(lean, gradient(), tolerance=0.1)


def kept_by_a_block(model: Any) -> Counter[int]:
    """Elements per token, of the model's size, of each storage that one block keeps for backward, weights and rotary
    tables apart.
    """
    decoder = find_decoder(model)
    hidden = values(1, TOKENS, D, seed=7, dtype=model.dtype).requires_grad_()
    positions = torch.arange(TOKENS)[None]
    rotary = decoder.body.rotary_emb(hidden, positions)
    apart = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotary)}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # kept alive: an address must not be given out twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        decoder.layers[1](hidden, position_embeddings=rotary, attention_mask=None).sum().backward()
    return Counter(
        t.untyped_storage().nbytes() // hidden.element_size() // TOKENS for at, t in kept.items() if at not in apart
    )


@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.float32, (6, 4)), (torch.bfloat16, (4, 4 + 2))], ids=["float32", "bfloat16"]
)
def test_what_a_block_keeps(dtype, own) -> None:
    """Block input, q, attention output, its sum with the input; gate and up. Not: two normed inputs, an activation, a
    product, nor in 16 bits the norms' inputs widened, which have the size of the MLP's tensors here.
    """
    model = wrap(tiny_model(dtype=dtype))
    use_low_rank_forward(model)
    before = kept_by_a_block(model)
    assert (before[D], before[INNER]) == own
    use_lean_layers(model)
    after = kept_by_a_block(model)
    assert (after[D], after[INNER]) == (4, 2)
    assert sum(after.values()) <= sum(before.values()) - 2 - 2


def test_one_computation_serves_all_readers_and_is_given_up(monkeypatch) -> None:
    made: Counter[str] = Counter()
    live: list[Recomputation] = []

    class Watched(Recomputation):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            live.append(self)

    monkeypatch.setattr(recompute, "Recomputation", Watched)
    model = wrap(tiny_model())
    use_low_rank_forward(model)
    use_lean_layers(model)
    block: Any = find_decoder(model).layers[1]
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        module = getattr(block, name)

        def counted(*inputs: Tensor, name: str = name, make: Any = module._lean_make) -> Tensor:
            made[name] += 1
            return make(*inputs)

        module._lean_make = counted
    hidden = values(1, TOKENS, D, seed=8, dtype=torch.float32).requires_grad_()
    rotary = find_decoder(model).body.rotary_emb(hidden, torch.arange(TOKENS)[None])
    output = block(hidden, position_embeddings=rotary, attention_mask=None)
    assert set(made.values()) == {1}
    output.sum().backward()
    assert made == {"input_layernorm": 2, "post_attention_layernorm": 2, "mlp": 2}
    # q, k and v read it through one product of theirs, and so do gate and up.
    assert sorted(r.readers for r in live) == [1, 1, 1]
    assert all(r._made is None for r in live)


def test_what_was_changed_or_viewed_has_no_origin() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    made = recomputable(torch.sin, x)
    origin = origin_of(made)
    assert origin is not None
    assert torch.equal(origin.recomputation.read(origin.inputs), made)
    assert origin_of(made.view(4, 3)) is None
    made.mul_(2)
    assert origin_of(made) is None
    assert origin_of(x) is None
    with torch.no_grad():
        assert origin_of(recomputable(torch.sin, x)) is None


def test_the_own_layers_come_back() -> None:
    model, changes = tiny_model(), Changes()
    use_lean_layers(model, changes)
    use_lean_layers(model, changes)
    bound = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert {name.rsplit(".", 1)[-1] for name in bound} == {"input_layernorm", "post_attention_layernorm", "norm", "mlp"}
    changes.undo()
    assert not any("forward" in module.__dict__ or "_lean_make" in module.__dict__ for module in model.modules())


def test_trained_norms_keep_their_gradient() -> None:
    own, lean = tiny_model(), tiny_model()
    use_lean_layers(lean)
    for model in (own, lean):
        model.requires_grad_(True)
        model(torch.arange(3, 12)[None]).logits.square().mean().backward()
    for (name, expected), value in zip(own.named_parameters(), lean.parameters()):
        assert_matches(value.grad, expected.grad, tolerance=1e-5, name=name)


def test_a_bound_model_is_copied_and_pickled() -> None:
    model, ids = tiny_model(), torch.arange(3, 12)[None]
    expected = model(ids).logits
    use_lean_layers(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        norm = find_decoder(twin).body.norm
        assert norm.forward.args[0] is norm


def test_liger_s_layers_come_back() -> None:
    pytest.importorskip("liger_kernel", reason="Liger's layers need liger-kernel")
    model = tiny_model()
    found = liger.replace_modules(model)
    names = {*found.norms, *found.mlps, *found.attentions}
    body = find_decoder(model).body
    changes = Changes()
    use_lean_layers(model, changes)
    changes.undo()
    assert {name for name, module in body.named_modules() if liger.uses_liger(module)} == names


def test_other_families_are_left_alone() -> None:
    model = tiny_model()
    find_decoder(model).body.config.model_type = "granite"
    use_lean_layers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
