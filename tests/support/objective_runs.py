"""One step of an objective on a tiny model, through the product's own runner and as its plain expression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import objective_oracles as oracles
import torch
from tiny_models import adapted_model, gradients, ragged_batch, runner_on
from torch import Tensor

from repbend_fast.data.records import Batch
from repbend_fast.models import find_decoder
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.adversarial import AdversarialConfig
from repbend_fast.objectives.ce_u import CEUConfig
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.lat import LATConfig
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.rmu import RMUConfig
from repbend_fast.objectives.sat_imp import AscentConfig, SatImpConfig, WGAConfig
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.objectives.simnpo import SimNPOConfig
from repbend_fast.objectives.undial import UNDIALConfig
from repbend_fast.objectives.x_boundary import XBoundaryConfig
from repbend_fast.step import StreamResult
from repbend_fast.step.levers import EVERY_STREAM, Levers

BATCH = ragged_batch()
BLOCKS = 4
STEP, STEPS = 2, 10
CONFIGS: dict[str, MethodConfig] = {
    "circuit_breaker": CircuitBreakerConfig(layers=[2, 3]),
    "rmu": RMUConfig(layer=2, coefficient=6.5, retain=3.0, direction_seed=5),
    "npo": NPOConfig(beta=0.2, retain_nll=0.5, retain_kl=0.3),
    "crl": CRLConfig(window_start=2, window_size=2),
    "simnpo": SimNPOConfig(beta=0.6, delta=4.0),  # at the published ones a random model is past all preference
    "wga": WGAConfig(power=0.5, retain_nll=0.7),
    "sat_imp": SatImpConfig(power=0.8, rest_power=2.0),
    "x_boundary": XBoundaryConfig(layers=[2, 3]),
    "undial": UNDIALConfig(strength=3.0, retain_nll=0.5),
    "ce_u": CEUConfig(retain_nll=0.5),
}
ALL_CONFIGS: dict[str, MethodConfig] = {"repbend": RepBendConfig(window_start=2, window_size=2, pair=0.4), **CONFIGS}

# Their streams are perturbed by what depends on the weights, as a constant to the gradient.
ATTACK = AdversarialConfig(weight=0.5, states=[0, 2], radius=0.5, search_steps=2, step_size=0.1)
SEARCHING: dict[str, MethodConfig] = {"lat": LATConfig(states=[0, 2], radius=0.5, search_steps=3, step_size=0.1)}
ATTACKED: dict[str, MethodConfig] = {
    "repbend, attacked": RepBendConfig(window_start=2, window_size=2, pair=0.4, refusal=2.0, adversarial=ATTACK),
    **{
        f"{name}, attacked": CONFIGS[name].model_copy(update={"adversarial": ATTACK, "refusal": 2.0})
        for name in ("circuit_breaker", "x_boundary", "crl")
    },
}
# The same methods with other settings, where those take another way.
OTHERWISE: dict[str, MethodConfig] = {
    "crl, cosine": CRLConfig(window_start=2, window_size=2, distance="cosine", safe_margin=0.3, unsafe_margin=0.5),
    **ATTACKED,
}


@dataclass
class Result:
    """A stream's result and the weights of its terms."""

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]

    @staticmethod
    def of(result: StreamResult, weights: dict[str, float]) -> Result:
        return Result(result.loss, result.terms, weights)


def precise_model(**settings: Any) -> Any:
    """A tiny Llama with an adapter, in float64 throughout: transformers' norm rounds to float32, which finite
    differences would see.
    """
    model = adapted_model(dtype=torch.float64, **settings)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(_norm, module)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def run_objective(
    model: Any,
    config: MethodConfig,
    *,
    step: int = STEP,
    piece_tokens: int | None = None,
    packing: str = "off",
    checkpoint_blocks: int = 0,
    dropout_seed: int = 0,
    measure: bool = False,
    batch: Batch = BATCH,
    share_beginnings: str = "off",
) -> tuple[list[Result], dict[str, Tensor]]:
    """Results by stream, and the gradients that the step leaves."""
    model.zero_grad(set_to_none=True)
    objective = build_objective(config, find_decoder(model).num_blocks, STEPS)
    sizes = {} if piece_tokens is None else {EVERY_STREAM: piece_tokens}
    levers = Levers(sizes, checkpoint_blocks, packing=packing, share_beginnings=share_beginnings)  # type: ignore[arg-type]
    runner = runner_on(model, levers, uses_head=objective.uses_head)
    results = []
    for stream in objective.streams(batch, step):
        result = runner.measure(stream) if measure else runner.backward(stream, dropout_seed=dropout_seed)
        results.append(Result.of(result, stream.weights))
    return results, gradients(model)


def plain_terms(model: Any, config: MethodConfig, step: int = STEP, batch: Batch = BATCH) -> dict[str, torch.Tensor]:
    """The weighted terms of the plain expression."""
    if isinstance(config, CircuitBreakerConfig):
        return oracles.circuit_breaker(model, batch, config, step, STEPS)
    if isinstance(config, XBoundaryConfig):
        return oracles.x_boundary(model, batch, config, step, STEPS)
    if isinstance(config, UNDIALConfig | CEUConfig):
        return oracles.lowered_label(model, batch, config)
    if isinstance(config, RMUConfig):
        terms = oracles.rmu(model, batch, config)
        return terms if config.retain else {"forget": terms["forget"]}
    if isinstance(config, NPOConfig):
        return oracles.npo(model, batch, config)
    if isinstance(config, SimNPOConfig):
        return oracles.simnpo(model, batch, config)
    if isinstance(config, AscentConfig):
        return oracles.weighted_ascent(model, batch, config)
    assert isinstance(config, CRLConfig)
    return oracles.crl(model, batch, config)
