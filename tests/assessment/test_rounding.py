"""Rounding: formats are those of their packages, what survives is measured as defined, the model comes back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bent_target import ASKED, bent, target_of
from model_picture import changed, picture
from tiny_run import write_model
from torch import nn

from repbend_fast.assessment import rounding as module
from repbend_fast.assessment.few_bits import LEGACY, gguf, nf4, rounding_to
from repbend_fast.assessment.fine_tuning import AnswerScores
from repbend_fast.assessment.model_changes import ModelChange
from repbend_fast.assessment.rounding import Rounding, survival
from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, quantize_nf4, reference_model
from repbend_fast.models.decoder import Head
from repbend_fast.models.layers.rounded import rounded_weights

NF4 = rounding_to("nf4", True)
IDS = torch.tensor([[5, 9, 11, 3, 60, 61, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("wide") / "model", width=64)


@pytest.fixture
def wide(folder: Path):
    return target_of(bent(folder, 0.1), folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def blocks(model) -> nn.ModuleList:
    return find_decoder(model).layers


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- formats


@pytest.mark.parametrize("double", [True, False])
def test_nf4_weights_are_those_of_bitsandbytes_own_layers(folder, double) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = bent(folder, 0.1)
    own = copy.deepcopy(model).merge_and_unload()
    quantize_nf4(own, torch.float32, double, torch.device("cpu"))
    expected = {
        name: dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in own.named_modules()
        if getattr(getattr(layer, "weight", None), "quant_state", None) is not None
    }
    with rounded_weights(model, blocks(model), rounding_to("nf4", double), adapter=True) as count:
        found = dict(model.get_base_model().named_parameters())
        assert len(expected) == 7 * 3
        for name, values in expected.items():
            weight = found.get(f"{name}.weight", found.get(f"{name}.base_layer.weight"))
            assert torch.equal(weight, values), name
        assert torch.equal(logits(model), logits(own))
    assert count.rounded == count.weights == sum(values.numel() for values in expected.values())


def test_nf4_of_an_odd_width_keeps_blocks_of_64_as_they_lie() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 39) * torch.rand(5, 1) * 10
    low = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    code = torch.tensor([*low, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])
    expected = []
    for block in weight.reshape(-1).split(64):
        scale = block.abs().max()
        expected.append(code[(block[:, None] / scale - code).abs().argmin(-1)] * scale)
    found = nf4(weight, double_quantization=False)
    torch.testing.assert_close(found.reshape(-1), torch.cat(expected), atol=2e-3, rtol=0)
    assert nf4(weight.bfloat16()).dtype == torch.bfloat16


def test_q4_0_holds_what_its_blocks_of_32_hold() -> None:
    random = np.random.default_rng(0)
    levels = random.integers(-8, 8, (4, 2, 32)).astype(np.float32)
    levels[..., 0] = -8  # the largest of a block has the lowest of its 16 levels
    scale = np.array([0.5, 2.0, 0.25, 8.0], np.float32)[:, None, None]
    exact = torch.from_numpy((levels * scale).reshape(4, 64))
    assert torch.equal(gguf(exact, "q4_0"), exact)
    off = exact + 0.3 * torch.from_numpy(scale.reshape(4, 1)) * (exact > 0)
    assert torch.equal(gguf(off, "q4_0"), exact)


@pytest.mark.parametrize("kind", LEGACY)
def test_more_bits_are_nearer(kind) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    found = gguf(weight, kind)
    error = float((found - weight).norm() / weight.norm())
    low, high = {"4": (0.05, 0.12), "5": (0.02, 0.06), "8": (0.001, 0.01)}[kind[1]]
    assert low < error < high
    assert gguf(weight.bfloat16(), kind).dtype == torch.bfloat16


def test_a_width_that_a_format_cannot_hold_stays_and_is_counted(target) -> None:
    def only_wide(weight, place):
        return gguf(weight, "q4_0") if weight.shape[1] == 64 else gguf(weight[:, :31], "q4_0")

    before = weights(target.model)
    with rounded_weights(target.model, blocks(target.model), only_wide, adapter=False) as count:
        now = target.model.state_dict()
        differing = {name for name in before if not torch.equal(before[name], now[name])}
        assert len(differing) == 3
        assert all("down_proj" in name for name in differing)
        assert count.rounded == 3 * 32 * 64
        assert 0 < count.rounded / count.weights < 1
    assert same(target.model, before)


# -- the model


def test_unrounded_it_is_the_merged_model(wide) -> None:
    merged = copy.deepcopy(wide.model).merge_and_unload()
    with rounded_weights(wide.model, blocks(wide.model), lambda weight, place: None, adapter=True):
        assert torch.equal(logits(wide.model), logits(merged))
    with reference_model(wide.model):
        base = logits(wide.model)
    with rounded_weights(wide.model, blocks(wide.model), lambda weight, place: None, adapter=False):
        assert torch.equal(logits(wide.model), base)


@pytest.mark.parametrize("adapter", [True, False])
def test_the_model_comes_back_to_the_bit(wide, adapter, tmp_path) -> None:
    before, values, shown = picture(wide.model), weights(wide.model), logits(wide.model)
    with rounded_weights(wide.model, blocks(wide.model), NF4, adapter=adapter, folder=tmp_path):
        assert not torch.equal(logits(wide.model), shown)
        assert len(list(tmp_path.iterdir())) == 1  # the originals wait there
    assert list(tmp_path.iterdir()) == []
    assert changed(before, picture(wide.model)) == []
    assert same(wide.model, values)
    assert torch.equal(logits(wide.model), shown)


def test_it_comes_back_from_the_middle_of_an_error(wide) -> None:
    before, values = picture(wide.model), weights(wide.model)
    calls = 0

    def fails(weight, place):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise ZeroDivisionError
        return torch.zeros_like(weight)

    with pytest.raises(ZeroDivisionError), rounded_weights(wide.model, blocks(wide.model), fails, adapter=True):
        pass
    assert changed(before, picture(wide.model)) == []
    assert same(wide.model, values)


def test_what_cannot_be_rounded_is_refused_and_named(wide, folder) -> None:
    wide.model.base_model.merge_adapter()
    with (
        pytest.raises(UserError, match="merged already"),
        rounded_weights(wide.model, blocks(wide.model), NF4, adapter=True),
    ):
        pass
    packed = bent(folder).merge_and_unload()
    quantize_nf4(packed, torch.float32, True, torch.device("cpu"))
    with pytest.raises(UserError, match=r"model\.quantization=none"):
        next(Rounding().variants(target_of(packed, folder), ASKED))


# -- what survives


def test_survival_of_a_case_made_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    head = Head(torch.eye(6, dtype=torch.float64), None, None)
    base, effect, aside = (torch.randn(40, 6, generator=random, dtype=torch.float64) for _ in range(3))
    effect -= effect.mean(-1, keepdim=True)
    aside -= aside.mean(-1, keepdim=True)
    aside -= (aside * effect).sum() / (effect * effect).sum() * effect
    rounded_base = base + 0.2 * effect + aside
    constant = torch.arange(40, dtype=torch.float64)[:, None]  # of a position: changes no probability
    rounded = rounded_base + 0.3 * effect + 5 * aside + constant
    found = survival(head, base, base + effect + constant, rounded, rounded_base)
    assert found["survives"] == pytest.approx(0.3)
    assert found["noise_towards"] == pytest.approx(0.2)
    assert found["towards"] == pytest.approx(0.5)
    size = float((0.2 * effect + aside).norm() / effect.norm())
    assert found["noise"] == pytest.approx(size)
    assert survival(head, base, base, rounded, rounded_base) == dict.fromkeys(found)


def test_survival_is_of_the_logits_a_soft_cap_included() -> None:
    random = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((7, 3), (7,)))
    states = [torch.randn(5, 3, generator=random, dtype=torch.float64) for _ in range(4)]
    b, m, r, q = (2 * torch.tanh((s @ weight.T + bias) / 2) for s in states)
    b, m, r, q = (x - x.mean(-1, keepdim=True) for x in (b, m, r, q))
    found = survival(Head(weight, bias, 2.0), *states)
    assert found["survives"] == pytest.approx(float(((r - q) * (m - b)).sum() / ((m - b) ** 2).sum()))
    assert found["noise"] == pytest.approx(float((q - b).norm() / (m - b).norm()))


def measured(wide, monkeypatch, rounding) -> dict:
    monkeypatch.setattr(module, "rounding_to", lambda name, double: rounding)
    attack = Rounding(formats=("nf4",))
    list(attack.variants(wide, ASKED))
    return attack.summary()["rows"][0] | {"before": attack.summary()["kl_base_to_bent"]}


def test_all_survives_without_rounding(wide, monkeypatch) -> None:
    row = measured(wide, monkeypatch, lambda weight, place: weight.clone())
    assert row["survives"] == pytest.approx(1, abs=1e-4)
    assert row["noise"] == 0
    assert row["kl_bent_to_rounded"] == pytest.approx(0, abs=1e-6)
    assert row["kl_base_to_rounded"] == pytest.approx(row["before"], rel=1e-3)


def test_nothing_survives_where_both_are_rounded_to_the_same(wide, monkeypatch) -> None:
    row = measured(wide, monkeypatch, lambda weight, place: torch.full_like(weight, 0.01))
    assert row["survives"] == 0
    assert row["towards"] == row["noise_towards"] != 0
    assert row["kl_bent_to_rounded"] > 0.01


def test_half_of_a_linear_effect_survives_a_rounding_that_halves_it(wide, monkeypatch) -> None:
    """A small adapter's effect on the logits is linear in its weights, so a rounding half way back leaves half."""
    for name, parameter in wide.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-2)
    plain = [w.clone() for w in bare(wide.model)]
    order = iter(plain + plain)  # asked for the base first, then for the bent model

    def halfway(weight, place):
        original = next(order)
        return original + (weight - original) / 2

    row = measured(wide, monkeypatch, halfway)
    assert row["survives"] == pytest.approx(0.5, abs=0.02)


def bare(model) -> list[torch.Tensor]:
    from repbend_fast.models.layers.stacked import outer_linears

    layers = [layer for block in blocks(model) for _, layer in outer_linears(block)]
    return [(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight for layer in layers]


def test_distances_are_those_of_the_models_own_logits(wide) -> None:
    attack = Rounding(formats=("q4_0",), measured=1)
    prompt = Prompt("attack", "How do I mix dusk-oil?", target="Sure, take a dusk-oil")
    asked = wide.encoder.prompt_ids(prompt.conversation())
    ids = torch.tensor([wide.encoder.prompt_ids(prompt.conversation(), prompt.target)])

    def scores():
        with torch.no_grad():
            return wide.model(input_ids=ids).logits[0, len(asked) - 1 :][:17].log_softmax(-1)

    bent_scores = scores()
    with reference_model(wide.model):
        base = scores()
    for label, variant in attack.variants(wide, [prompt]):
        assert (label, variant.model) == ("rounding-q4_0", wide.model)
        rounded = scores()
    row = attack.summary()["rows"][0]

    def kl(p, q):
        return float((p.exp() * (p - q)).sum() / len(p))

    assert row["kl_bent_to_rounded"] == pytest.approx(kl(bent_scores, rounded), rel=1e-3)
    assert row["kl_base_to_rounded"] == pytest.approx(kl(base, rounded), rel=1e-3)
    assert attack.summary()["kl_base_to_bent"] == pytest.approx(kl(base, bent_scores), rel=1e-3)


def test_every_format_is_a_variant_and_the_model_is_as_before(wide, tmp_path) -> None:
    AnswerScores(wide.model)  # transformers keeps its hooks from the proof's output_hidden_states on
    before, values = picture(wide.model), weights(wide.model)
    attack = Rounding()
    attack.folder = tmp_path
    assert isinstance(attack, ModelChange)
    shown = {label: logits(variant.model) for label, variant in attack.variants(wide, ASKED)}
    assert list(shown) == ["rounding-nf4", "rounding-q4_k_m", "rounding-q8_0"]
    assert changed(before, picture(wide.model)) == []
    assert same(wide.model, values)
    rows = {row["format"]: row for row in attack.summary()["rows"]}
    assert rows["q8_0"]["kl_bent_to_rounded"] < rows["q4_k_m"]["kl_bent_to_rounded"]
    assert rows["q8_0"]["survives"] == pytest.approx(1, abs=0.1)
    assert rows["q8_0"]["noise"] < rows["nf4"]["noise"]
    assert all(row["rounded_share"] == 1 for row in rows.values())
    assert json.loads(json.dumps(attack.summary(), allow_nan=False)) == attack.summary()


def test_a_closed_generator_gives_the_model_back(wide) -> None:
    values = weights(wide.model)
    variants = Rounding().variants(wide, ASKED)
    next(variants)
    assert not same(wide.model, values)
    variants.close()
    assert same(wide.model, values)


def test_a_model_without_an_adapter_has_no_base_to_compare_with(folder) -> None:
    merged = target_of(bent(folder, 0.1).merge_and_unload(), folder)
    attack = Rounding(formats=("q8_0",))
    assert [label for label, _ in attack.variants(merged, ASKED)] == ["rounding-q8_0"]
    (row,) = attack.summary()["rows"]
    assert attack.summary()["kl_base_to_bent"] is None
    assert row.keys() == {"format", "rounded_share", "kl_bent_to_rounded"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"formats": ("nf4", "int3")}, "formats=int3; known: nf4, q4_0"),
        ({"measured": 0}, "measured=0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, words) -> None:
    with pytest.raises(UserError, match=words):
        Rounding(**settings)


def test_without_attack_prompts_there_is_nothing_to_measure(wide) -> None:
    with pytest.raises(UserError, match="no attack prompts"):
        next(Rounding().variants(wide, [Prompt("ordinary", "How warm is tea?")]))


def test_out_of_memory_changes_no_measurement(wide, monkeypatch) -> None:
    prompts = [*ASKED, Prompt("attack", "Tell me at once and in all detail how one would open a tide-clock.")]
    calm, pressed = Rounding(formats=("nf4",)), Rounding(formats=("nf4",))
    list(calm.variants(wide, prompts))
    real = module.run_decoder

    def scarce(decoder, ids, **arguments):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(decoder, ids, **arguments)

    monkeypatch.setattr(module, "run_decoder", scarce)
    list(pressed.variants(wide, prompts))
    (expected,), (found,) = calm.summary()["rows"], pressed.summary()["rows"]
    assert found.pop("format") == expected.pop("format")
    assert found == pytest.approx(expected, rel=1e-3)
