"""Compares models on Liger's layers with the same models on their own, the kernels run by Triton's interpreter. Prints
one line per family.

A script, because Triton decides at import whether kernels are interpreted: run it with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy
import triton
import triton.language as tl
from kernel_compare import assert_matches
from model_picture import changed, picture
from tiny_models import BLOCKS, flat, gradients, objective_config, pair, run_step, sequence, tiny_model, wrap
from torch import Tensor
from triton.runtime import interpreter

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.models import prepared, surgery
from repbend_fast.models.layers.liger import replace_modules
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamResult, StreamRunner
from repbend_fast.step.levers import Levers

# Between them: norms of queries and keys, Gemma's norms and GeGLU, a fused gate.
FAMILIES = ("llama", "gemma3", "phi3")
# Interpreted kernels take a millisecond per row.
BATCH = Batch((sequence(2, 2, 1),), (sequence(3, 1, 3),), (pair(2, 1, 2, 5),), (Sequence(sequence(3, 0, 7).ids, 0),))
CONFIG = objective_config(alpha_mode="all", loss_mode="prompt_response")


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def teach_interpreter() -> None:
    """Supply what a GPU's compiler knows and the interpreter does not: libdevice functions, and scalar arguments that
    are floats.
    """
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(
                interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32), tl.float32
            )
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.rms_norm.rsqrt = rsqrt
    liger_kernel.ops.geglu.tanh = tanh


def prepared_step(family: str) -> tuple[dict[str, StreamResult], dict[str, Tensor]]:
    """A step on a model that is prepared with Liger's layers, as on CUDA, and is afterwards the one that it was."""
    model, levers = wrap(tiny_model(family)), Levers(packing="on")
    before = picture(model)
    with patch.object(surgery, "use_liger", lambda model, setting, device, changes: replace_modules(model, changes)):
        ready = prepared(model, levers, liger="auto")
    assert changed(before, picture(model))
    runner = StreamRunner(ready, levers)
    streams = build_objective(CONFIG, BLOCKS).streams(BATCH, 0)
    results = {stream.name: runner.backward(stream, dropout_seed=0) for stream in streams}
    ready.restore()
    assert changed(before, picture(model)) == []
    return results, gradients(model)


def compare(family: str) -> None:
    """Distances at LoRA's start are 0.0; with a trained adapter, terms and gradients are those of the model's own
    layers.
    """
    replaced = tiny_model(family)
    found = replace_modules(replaced)
    assert found.norms
    assert found.mlps
    assert found.attentions
    start, _ = run_step(wrap(replaced, trained=False), CONFIG, BATCH)
    for name in ("safe", "unsafe"):
        assert all(float(distance) == 0.0 for distance in start[name].layers[name].values()), (
            f"{family}: {name} is not 0 at the start"
        )
    assert float(start["unsafe"].terms["cosine"]) > 0.01
    results, gradient = prepared_step(family)
    expected_results, expected = run_step(wrap(tiny_model(family)), CONFIG, BATCH)
    for name, result in expected_results.items():
        assert_matches(results[name].loss, result.loss, tolerance=1e-4, name=f"{family}: {name}")
    assert_matches(flat(gradient), flat(expected), tolerance=1e-4, name=f"{family}: gradient")


if __name__ == "__main__":
    teach_interpreter()
    for family in FAMILIES:
        compare(family)
        print(f"{family}:ok", flush=True)
