"""LoRA's own forward: the numbers of PEFT's, less memory, the same model around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from peft import LoraConfig, PeftModel, get_peft_model
from repbend_kernels import keyed_dropout, low_rank, low_rank_chunks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from repbend_fast.errors import UserError
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.lora import LowRankForward, lora_dropout, use_low_rank_forward

INNER, OUTER, ROWS = 64, 192, 24
P = 0.3
KEYS = torch.arange(ROWS).view(2, ROWS // 2) * 977
# bf16's own step, for one rounding of each result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}


class _Pair(nn.Module):
    """Two linear layers, the first with a bias, and a nonlinearity that makes the second's input depend on the first's
    adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(INNER, OUTER)
        self.down_proj = nn.Linear(OUTER, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


def peft_model(
    dtype: torch.dtype, *, nf4: bool = False, adapter_dtype: torch.dtype | None = None, **settings: Any
) -> Any:
    """A frozen pair with a random adapter, PEFT's own forward."""
    torch.manual_seed(0)
    base = _Pair().to(dtype).requires_grad_(False)
    if nf4:
        _quantize(base, dtype)
    options: dict[str, Any] = {"r": 8, "lora_alpha": 5, "lora_dropout": P, "init_lora_weights": False} | settings
    model = get_peft_model(
        base, LoraConfig(target_modules=["up_proj", "down_proj"], **options), autocast_adapter_dtype=False
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Values that 16 bits cannot hold, which is where adapters in 32 bits matter.
            parameter.data = (parameter.data.double() * 1.0009765).to(adapter_dtype or dtype)
    return model.eval()


def _quantize(base: nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for name, linear in list(base.named_children()):
        quantized = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        quantized.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized
        )
        quantized.bias = linear.bias
        quantized.support_avx512bf16_for_cpu = False
        setattr(base, name, quantized.to("cpu"))


def ours(model: Any) -> Any:
    """A copy with the replaced forward."""
    twin = copy.deepcopy(model)
    use_low_rank_forward(twin)
    return twin


def inputs(dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    x = torch.randn(2, ROWS // 2, INNER, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def outcome(model: Any, x: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
    """Output, and gradients of x and the adapter, of one weighted sum."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(x.requires_grad)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with lora_dropout(model, keys):
        y = model(x)
        y.backward(weights.to(y))
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), **found} | ({"x": x.grad} if x.requires_grad else {})


class _KeyedDropout(nn.Module):
    """PEFT's dropout module with the masks that our layers draw."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return keyed_dropout(x, KEYS.reshape(x.shape[:-1]), self.place, P, implementation="eager")


def keyed_peft(model: Any) -> Any:
    """PEFT's own forward with the keyed masks: the plain expression of what ours computes."""
    twin = copy.deepcopy(model)
    layers = [m for m in twin.modules() if hasattr(m, "lora_dropout")]
    for place, layer in enumerate(layers):
        layer.lora_dropout["default"] = _KeyedDropout(place)
    return twin


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Rows are walked in several chunks, the last one short."""
    monkeypatch.setattr(low_rank_chunks, "CHUNK_ELEMENTS", {"cpu": 7 * OUTER, "other": 7 * OUTER})
    monkeypatch.setattr(low_rank_chunks, "LEAST_ROWS", 1)


@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_output_and_gradients_are_those_of_peft(small_chunks, dtype, nf4, dropout) -> None:
    if nf4 and dtype == torch.float64:
        pytest.skip("NF4 computes in 32 or 16 bits")
    model = peft_model(dtype, nf4=nf4)
    expected = outcome(keyed_peft(model) if dropout else model, inputs(dtype))
    got = outcome(ours(model), inputs(dtype), KEYS if dropout else None)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert_matches(got[name], value, tolerance=2 * TOLERANCE[dtype], name=name)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_gradients_the_output_is_the_same_to_the_bit(small_chunks, dtype, nf4) -> None:
    model = ours(peft_model(dtype, nf4=nf4))
    expected = outcome(model, inputs(dtype))["y"]
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model(inputs(dtype)), expected)
    with torch.no_grad():
        assert torch.equal(model(inputs(dtype)), expected)
    with torch.no_grad(), lora_dropout(model, KEYS):
        assert not torch.equal(model(inputs(dtype)), expected)


def test_dropout_changes_the_gradient_as_much_as_it_should() -> None:
    """The comparison above would notice masks of another module, row or step."""
    model = ours(peft_model(torch.float32))
    plain, dropped = outcome(model, inputs()), outcome(model, inputs(), KEYS)
    others = outcome(model, inputs(), KEYS + 1)
    for name in dropped:
        assert relative_l2(dropped[name], plain[name]) > 1e-2, name
        assert relative_l2(dropped[name], others[name]) > 1e-2, name
    again = outcome(model, inputs(), KEYS)
    assert all(torch.equal(again[name], dropped[name]) for name in dropped)


def test_masks_differ_between_layers() -> None:
    layers = [m for m in ours(peft_model(torch.float32)).modules() if isinstance(m, LowRankForward)]
    assert [layer.place for layer in layers] == [0, 1]
    assert layers[0].dropout_keys is layers[1].dropout_keys


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
def test_error_of_a_bf16_model_with_an_fp32_adapter_is_not_above_peft_s(nf4) -> None:
    """Against float64 on the same weights; 16-bit rounding of the adapter alone would show in its gradients."""
    model = peft_model(torch.bfloat16, nf4=nf4, adapter_dtype=torch.float32)
    exact = copy.deepcopy(model)
    for name, linear in list(exact.get_base_model().named_children()):
        base = linear.base_layer
        weight = base.weight
        if nf4:
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            linear.base_layer = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            linear.base_layer.bias = base.bias
        linear.base_layer.weight = nn.Parameter(weight.double(), requires_grad=False)
        assert name in ("up_proj", "down_proj")
        linear.double()
    expected = outcome(_as_peft(exact, model), inputs(torch.bfloat16).double())
    theirs, got = outcome(model, inputs(torch.bfloat16)), outcome(ours(model), inputs(torch.bfloat16))
    for name, value in expected.items():
        assert got[name].dtype == theirs[name].dtype
        assert relative_l2(got[name], value) <= 1.02 * relative_l2(theirs[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
def test_error_on_a_gpu_is_that_of_the_cpu_s(dropout) -> None:
    """There, kernels multiply by parts of wide operands; a part that is lost shows as an error of 2⁻⁹."""
    model = ours(peft_model(torch.bfloat16, adapter_dtype=torch.float32))
    keys = KEYS if dropout else None
    exact = outcome(copy.deepcopy(model).double(), inputs(torch.bfloat16).double(), keys)
    here = outcome(model, inputs(torch.bfloat16), keys)
    there = outcome(
        model.cuda(), inputs(torch.bfloat16).detach().cuda().requires_grad_(), keys.cuda() if dropout else None
    )
    for name, value in exact.items():
        assert there[name].dtype == here[name].dtype
        assert relative_l2(there[name].cpu(), value) <= 1.1 * relative_l2(here[name], value) + 1e-6, name


def _as_peft(exact: Any, model: Any) -> Any:
    """``exact`` in float64 runs PEFT's plain linear forward; a 4-bit layer's would look for a quantisation state."""
    from peft.tuners.lora import Linear

    del model
    for module in exact.modules():
        if hasattr(module, "lora_dropout"):
            module.__class__ = Linear
    return exact


@pytest.mark.parametrize("frozen", ["x", "A", "B", "A and B of one layer"])
def test_only_needed_gradients(small_chunks, frozen) -> None:
    plain = peft_model(torch.float32)
    full, model = outcome(keyed_peft(plain), inputs()), ours(plain)
    for name, parameter in model.named_parameters():
        if (
            (frozen == "A" and "lora_A" in name)
            or (frozen == "B" and "lora_B" in name)
            or ("one" in frozen and "lora" in name and "up" in name)
        ):
            parameter.requires_grad_(False)
    got = outcome(model, inputs(grad=frozen != "x"), KEYS)
    assert got.keys() < full.keys()
    for name, value in got.items():
        assert_matches(value, full[name], tolerance=1e-6, name=name)


class _Shared(nn.Module):
    """x is read by two adapted layers and goes on beside them, as by q, k, v and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(INNER, INNER), nn.Linear(INNER, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(x) * self.down_proj(x)


def test_gradients_of_a_shared_input() -> None:
    """The low-rank part goes into the base layer's gradient in place: nobody else's may change with it, nor a second
    backward.
    """
    config = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], lora_dropout=P, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(_Shared().double(), config, autocast_adapter_dtype=False).eval()
    expected = outcome(keyed_peft(model), inputs(torch.float64))
    for name, value in outcome(ours(model), inputs(torch.float64), KEYS).items():
        assert_matches(value, expected[name], tolerance=1e-9, name=name)
    x, twice = inputs(torch.float64), ours(model)
    with lora_dropout(twice, KEYS):
        y = twice(x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dropout", [False, True], ids=["off", "dropout"])
def test_two_active_adapters(small_chunks, dropout) -> None:
    model = peft_model(torch.float64)
    model.add_adapter(
        "other", LoraConfig(r=4, target_modules=["up_proj", "down_proj"], lora_dropout=P, init_lora_weights=False)
    )
    model.double().eval().base_model.set_adapter(["default", "other"])
    keyed = keyed_peft(model)
    for place, layer in enumerate(m for m in keyed.modules() if hasattr(m, "lora_dropout")):
        layer.lora_dropout["other"] = _KeyedDropout(place)
    expected = outcome(keyed if dropout else model, inputs(torch.float64))
    got = outcome(ours(model), inputs(torch.float64), KEYS if dropout else None)
    assert len(got) == len(expected) == 2 + 8
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=1e-13, name=name)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
def test_at_the_start_the_output_is_the_base_s_to_the_bit(nf4) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(peft_model(dtype, nf4=nf4, adapter_dtype=torch.float32, init_lora_weights=True))
        with torch.no_grad(), model.disable_adapter():
            expected = model(inputs(dtype))
        with lora_dropout(model, KEYS):
            assert torch.equal(model(inputs(dtype)), expected)


def test_checkpointing_draws_the_same_masks() -> None:
    model = ours(peft_model(torch.float64))
    expected = outcome(model, inputs(torch.float64), KEYS)
    whole = model.get_base_model()
    plain_forward = whole.forward
    whole.forward = lambda x: checkpoint(plain_forward, x, use_reentrant=False)
    got = outcome(model, inputs(torch.float64), KEYS)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_autocast() -> None:
    model = peft_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = outcome(model, inputs()), outcome(ours(model), inputs())
    assert got["y"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert_matches(got[name], value, tolerance=1.5e-2, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fake_tensors(dtype) -> None:
    """What the planner counts: outputs and gradients of the right shapes, whatever the number of rows, at once."""
    rows = 1 << 20
    with FakeTensorMode():
        x = torch.empty(1, rows, INNER, dtype=dtype, requires_grad=True)
        base, a, b = torch.empty(OUTER, INNER, dtype=dtype), torch.empty(8, INNER), torch.empty(OUTER, 8)
        hashes = torch.empty(rows, dtype=torch.int32)
        source, down = low_rank._Down.apply(x.reshape(rows, INNER), hashes, 0, P, None, "torch", a.requires_grad_())
        y = low_rank._Up.apply(source @ base.T, down, b.requires_grad_(), 1.5)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((rows, OUTER), dtype)
    for leaf in (x, a, b):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_compiled_without_a_graph_break() -> None:
    torch.compiler.reset()
    model = ours(peft_model(torch.float32))
    expected = outcome(model, inputs(), KEYS)
    model.get_base_model().forward = torch.compile(model.get_base_model().forward, fullgraph=True, backend="aot_eager")
    got = outcome(model, inputs(), KEYS)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=1e-6, name=name)


@pytest.mark.parametrize("nf4", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_kept_for_backward(dtype, nf4) -> None:
    """x by reference, P and the rows' hashes; no mask, no copy, no output of its own."""
    model = ours(peft_model(dtype, nf4=nf4, adapter_dtype=torch.float32))
    layer = model.get_base_model().up_proj
    x, kept = inputs(dtype), []
    with (
        lora_dropout(model, KEYS),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = layer(x)
    rows = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in kept
        if t.numel() >= ROWS and t.shape[0] in (2, ROWS)
    }
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    new = {at: size for at, size in rows.items() if at not in weights | {x.untyped_storage().data_ptr()}}
    assert x.untyped_storage().data_ptr() in rows
    assert y.untyped_storage().data_ptr() not in rows
    assert sorted(new.values()) == [ROWS * 4, ROWS * 8 * 4]  # int32 hashes, and P in float32


def test_memory_is_below_peft_s() -> None:
    """Above the output: the masked rows of a chunk and P, where PEFT holds several tensors of x's and the output's
    size.
    """
    rows = 49152  # several chunks
    sizes = {}
    for name, model in (
        ("peft", peft_model(torch.bfloat16, adapter_dtype=torch.float32).train()),
        ("ours", ours(peft_model(torch.bfloat16, adapter_dtype=torch.float32))),
    ):
        layer = model.get_base_model().up_proj
        x = torch.randn(1, rows, INNER).bfloat16().requires_grad_()

        def call(model=model, layer=layer, x=x, lean=name == "ours"):
            with lora_dropout(model, torch.arange(rows) if lean else None):
                layer(x).backward(torch.ones(1, rows, OUTER, dtype=torch.bfloat16))

        call()
        sizes[name] = peak_bytes(call, torch.device("cpu"))
    output, source = rows * OUTER * 2, rows * INNER * 2
    chunk = low_rank_chunks.CHUNK_ELEMENTS["cpu"] * 4
    # Output, its gradient, the gradient of x, P (until backward ends), Q, keys and hashes; of a chunk what is added to
    # its gradient, x masked, and the hashes and the widened x that are compared; of a quarter of one weights, their
    # gradients and small buffers, which differ by some KB with what ran before.
    assert sizes["ours"] <= 2 * output + source + rows * (2 * 8 * 4 + 8 + 4) + 3.75 * chunk
    assert sizes["ours"] < 0.7 * sizes["peft"]


def test_keys_that_do_not_fit_the_rows() -> None:
    model = ours(peft_model(torch.float32))
    with (
        pytest.raises(ValueError, match="keys for 23 rows, but the pass has 24"),
        lora_dropout(model, torch.arange(ROWS - 1)),
    ):
        model(inputs())


def test_keys_for_a_model_without_prepared_layers() -> None:
    model = peft_model(torch.float32)
    with lora_dropout(model, None):
        model(inputs())
    with pytest.raises(UserError, match="no LoRA adapter"), lora_dropout(model, KEYS):
        pass


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_lora_are_refused(settings) -> None:
    with pytest.raises(UserError, match="not plain LoRA"):
        use_low_rank_forward(peft_model(torch.float32, **settings))


def test_adapted_embeddings_are_refused() -> None:
    base = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"the adapter on .* is of kind Embedding"):
        use_low_rank_forward(get_peft_model(base, LoraConfig(target_modules=["0", "1"])))


def test_the_model_stays_a_peft_model(tmp_path) -> None:
    model = ours(peft_model(torch.float32))
    use_low_rank_forward(model)
    expected = model(inputs()).detach()
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(_Pair(), tmp_path).eval()
    assert_matches(loaded(inputs()), expected, tolerance=1e-6)
    model.merge_adapter()
    assert_matches(model(inputs()), expected, tolerance=1e-5)
    model.unmerge_adapter()
    assert_matches(model(inputs()), expected, tolerance=1e-5)
    merged = model.merge_and_unload()
    assert type(merged.up_proj) is nn.Linear
    assert_matches(merged(inputs()), expected, tolerance=1e-5)


def test_peft_s_forward_comes_back() -> None:
    model = peft_model(torch.float32)
    kinds = [type(module) for module in model.modules()]
    twin, changes = copy.deepcopy(model), Changes()
    use_low_rank_forward(twin, changes)
    assert [type(module) for module in twin.modules()] != kinds
    changes.undo()
    assert [type(module) for module in twin.modules()] == kinds
    model.train()
    twin.train()
    torch.manual_seed(0)
    expected = model(inputs())
    torch.manual_seed(0)
    assert torch.equal(twin(inputs()), expected)
    assert not torch.equal(twin(inputs()), expected), "its dropout draws anew"
    use_low_rank_forward(twin)
    with lora_dropout(twin, KEYS):
        assert not torch.equal(twin(inputs()), expected)
