"""What the passes take for granted, shown for one loaded model on a few tokens before anything is trained.

    packed = padded = alone    a sequence's hidden states do not depend on how its piece is laid out
    truncated = full           a pass that stops early gives the same bits
    ours = transformers'       hidden state l is ``output_hidden_states[l]``
    head                       softcap · tanh((W h + b) / softcap), or W h + b, are the model's logits, h scaled or not
    LoRA                       layers that no pass calls, whose adapter does nothing, are named

Errors are relative: per row ‖x − y‖ / ‖y‖. In 32 bits the largest row counts. In 16 bits rounding can send a single
token to another expert, so there the median counts, and beside it whether other tokens of the first sequence move the
second one's states.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.coverage import BlockKind, coverage_of
from repbend_fast.models.decoder import WITHOUT_HEAD, Head, causal_model, find_decoder, run_decoder
from repbend_fast.models.layers.lora import LowRankForward
from repbend_fast.models.layers.packing import Packed, pack
from repbend_fast.models.layers.switches import output_through
from repbend_fast.models.layers.varlen import shares_beginnings
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.retreat import is_out_of_memory

LENGTHS = (9, 6)
"""Of the two sequences. The longer one stands first: where a row leaks, the second is wrong, where padding
does, the padded one.
"""

ROW_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Relative error of a hidden state's rows up to which two layouts are the same. What leaks is off by 0.1 to 2."""

INFLUENCE_BOUND = 0.03
"""Of a 16-bit model: how far other tokens in the first sequence may move the second one's rows. Without a
leak the sums are the same.
"""

HEAD_BOUNDS = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 3e-4),
    torch.bfloat16: (6e-3, 2e-3),
}
"""Relative error of the logits (root mean square), and of their scale (slope of a regression, in which
rounding averages out).
"""

PATTERN = 48.0
"""Logits from −48 to 48 are put in place of the head's own on some rows, so that a soft-cap shows whatever
the logits are.
"""


PASS_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Check:
    """One line of the proof: what was compared, the error, the bound, and whether it holds. ``error`` None = not
    compared.
    """

    name: str
    error: float | None
    bound: float
    holds: bool
    remark: str = ""


@dataclass
class Proof:
    """What was shown for a model. ``packing`` is what its runner goes on with, ``autocast`` the dtype of its passes
    where that is not the weights' own; ``shares``: whether sequences of a row may have their beginning once; ``notes``
    are lines for the user.
    """

    packing: Literal["on", "off"]
    autocast: str | None = None
    shares: bool = False
    checks: list[Check] = field(default_factory=list)
    coverage: list[BlockKind] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """The proof in one line."""
        shown = ", ".join(check.name for check in self.checks if check.holds and check.error is not None)
        adapted = [kind for kind in self.coverage if kind.wanted]
        total = sum(kind.weights * len(kind.blocks) for kind in adapted)
        share = sum(kind.adapted * len(kind.blocks) for kind in adapted) / max(1, total)
        blocks = sum(len(kind.blocks) for kind in adapted)
        lora = f"LoRA on {share:.0%} of the weights of {blocks} of {sum(len(k.blocks) for k in self.coverage)} blocks"
        computed = f"; computed in {self.autocast}" if self.autocast else ""
        return f"model checked: {shown}; {lora if adapted else 'no LoRA'}{computed}"

    def as_dict(self) -> dict[str, object]:
        """Plain values for metrics.jsonl."""
        return {
            "packing": self.packing,
            "autocast": self.autocast,
            "checks": [vars(check) for check in self.checks],
            "coverage": [kind.as_dict() for kind in self.coverage],
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
        }


@torch.no_grad()
def prove_model(parts: ModelParts, packing: Literal["on", "off"], asked: str) -> Proof:
    """Run the checks on ``parts``' model, dropout off, under its autocast.

    Args:
        packing: the layout that the levers have come to; ``off`` where packing leaks, unless it was ``asked`` for
            (``memory.packing``).

    Raises:
        UserError: something does not hold without which the losses would be wrong; one line says what.
    """
    started = time.perf_counter()
    autocast = str(parts.autocast).removeprefix("torch.") if parts.autocast else None
    proof = Proof(packing, autocast, coverage=coverage_of(parts.model))
    with parts.autocasting():
        _Passes(parts, proof, asked).run()
    proof.notes += [note for kind in proof.coverage for note in kind.notes()]
    proof.seconds = time.perf_counter() - started
    return proof


class _Passes:
    def __init__(self, parts: ModelParts, proof: Proof, asked: str) -> None:
        self.parts, self.proof, self.asked = parts, proof, asked
        self.causal = causal_model(parts.model)
        self.kind = getattr(self.causal.config, "model_type", type(self.causal).__name__)
        self.last = parts.decoder.num_blocks
        rows = self.causal.get_input_embeddings().weight.shape[0]
        self.first, self.second = (_tokens(length, rows, start) for length, start in zip(LENGTHS, (11, 5)))
        self.other_first = _tokens(LENGTHS[0], rows, 29)

    def run(self) -> None:
        """Every check, the cheapest explanation of a difference first."""
        with self._noting_idle_layers():
            alone = [self._states(ids[None]) for ids in (self.first, self.second)]
        for layer, state in enumerate(alone[0]):
            shape = tuple(state.shape) if isinstance(state, Tensor) else None
            if shape is None or len(shape) != 3 or shape[:2] != (1, LENGTHS[0]) or shape != alone[0][0].shape:
                found = f"a {type(state).__name__}" if shape is None else f"of the shape {shape}"
                raise self._error(
                    f"hidden state {layer} is {found}, not a tensor [batch, tokens, width] of one width for all"
                )
        self._truncated(alone[0])
        self._transformers(alone[0])
        self._padded(alone[1])
        self._packed(alone)
        if self.proof.packing == "on" and shares_beginnings(self.parts.decoder.body, self.parts.device):
            self._shared(alone[0])

    def _error(self, what: str) -> UserError:
        return UserError(f"model type {self.kind} cannot be bent: {what}")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """What a family's code may raise inside, as one line."""
        try:
            yield
        except PASS_ERRORS as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise self._error(f"{what} ({one_line(error)})") from error

    def _states(self, ids: Tensor, packed: Packed | None = None, stop: int | None = None) -> list[Tensor]:
        states: list[Tensor] = []

        def visit(layer: int, hidden: Tensor) -> Tensor:
            del layer
            states.append(hidden)
            return hidden

        device = self.parts.device
        with self._telling("its blocks do not run one after the other as a pass needs it"):
            run_decoder(self.parts.decoder, ids.to(device), packed=packed, stop=stop or self.last, visit=visit)
        if len(states) != (stop or self.last) + 1:
            raise self._error(f"a pass up to hidden state {stop or self.last} met {len(states)} of them")
        return states

    @contextmanager
    def _noting_idle_layers(self) -> Iterator[None]:
        """Which adapted layers the passes inside never call: their parent reads the weight itself, or another input
        than text is missing. Numbered ones count together: no token may go to some expert.
        """
        called: dict[str, bool] = {}
        with ExitStack() as hooks:
            for number, block in enumerate(self.parts.decoder.layers):
                for path, module in block.named_modules():
                    if isinstance(module, LowRankForward):
                        name = f"{number}.{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', path)}"
                        called.setdefault(name, False)
                        hooks.enter_context(output_through(module, partial(_mark, called, name)))
            yield
        idle = sorted({name.partition(".")[2] for name, was in called.items() if not was})
        if idle:
            self.proof.notes.append(
                f"note: LoRA does nothing on {', '.join(idle)}: the blocks do not call these layers on text; "
                "lora.target_modules can leave them out"
            )

    def _truncated(self, full: list[Tensor]) -> None:
        worst = 0.0
        for stop in sorted({1, self.last - 1} - {0, self.last}):
            for layer, state in enumerate(self._states(self.first[None], stop=stop)):
                if torch.equal(state, full[layer]):
                    continue
                worst = max(worst, float(_row_errors(state, full[layer]).max()))
                raise self._error(
                    f"a pass that stops at hidden state {stop} gives another hidden state {layer} than the full one "
                    "(relative error "
                    f"{worst:.2g}): what stands behind its blocks acts before them too"
                )
        self.proof.checks.append(Check("truncated = full", worst, 0.0, True, "bit for bit"))

    def _transformers(self, ours: list[Tensor]) -> None:
        with self._telling("its own pass does not run on text alone"):
            theirs, got, expected = _own_pass(
                self.causal, self.parts.head, self.first[None].to(self.parts.device), ours[-1]
            )
        bound = ROW_BOUNDS[self._dtype(ours)]
        if len(theirs) != len(ours):
            self.proof.checks.append(
                Check("hidden states = transformers'", None, bound, True, "transformers gives none for this family")
            )
        else:
            errors = [float(_row_errors(a, b).max()) for a, b in zip(ours, theirs)]
            if not max(errors) <= bound:
                # State-space families begin with the first block's output and give the last one's twice.
                shifted = [*theirs[: len(theirs) - 2], theirs[-1]]
                moved = [float(_row_errors(a, b).max()) for a, b in zip(ours[1:], shifted)]
                errors = [0.0, *moved] if max(moved) <= bound else errors
            layer = max(range(len(errors)), key=errors.__getitem__)
            if not errors[layer] <= bound:
                raise self._error(f"hidden state {layer} is not transformers' own (relative error {errors[layer]:.2g})")
            self.proof.checks.append(Check("hidden states = transformers'", errors[layer], bound, True))
        if self.parts.head is not None:
            self.proof.checks.append(_head_check(self.kind, got, expected))

    def _padded(self, alone: list[Tensor]) -> None:
        padded = torch.zeros(2, LENGTHS[0], dtype=torch.int64)
        padded[0], padded[1, : LENGTHS[1]] = self.first, self.second
        states = [state[1:, : LENGTHS[1]] for state in self._states(padded)]
        error, bound = self._distance(states, alone), ROW_BOUNDS[self._dtype(alone)]
        if not error <= bound:
            raise self._error(
                f"a sequence padded on the right has other hidden states than alone (relative error {error:.2g}): its "
                "blocks are not "
                "causal, or read the padding"
            )
        self.proof.checks.append(Check("padded = alone", error, bound, True))

    def _packed(self, alone: list[list[Tensor]]) -> None:
        bound = ROW_BOUNDS[self._dtype(alone[0])]
        try:
            leak, error = self._leak(alone, bound)
        except UserError as failure:
            leak, error = one_line(failure), None
        self.proof.checks.insert(0, Check("packed = alone", error, bound, not leak, leak))
        if not leak:
            return
        if self.asked == "on":
            raise self._error(f"memory.packing=on: {leak}; use memory.packing=auto or off, which pads")
        if self.proof.packing == "on":
            self.proof.packing = "off"
            self.proof.notes.append(
                f"model type {self.kind}: {leak}; sequences are padded instead (memory.packing=off)"
            )

    def _leak(self, alone: list[list[Tensor]], bound: float) -> tuple[str, float | None]:
        """Why sequences must not share a row ("" where they may), and the error."""
        chunk = getattr(self.causal.config.get_text_config(), "attention_chunk_size", None)
        if chunk:
            return f"attention in chunks of {chunk} counts them from the row's beginning, not the sequence's", None
        split, packed = LENGTHS[0], pack(LENGTHS, self.parts.device)
        states = self._states(torch.cat([self.first, self.second])[None], packed)
        error = max(
            self._distance([s[:, :split] for s in states], alone[0]),
            self._distance([s[:, split:] for s in states], alone[1]),
        )
        if not error <= bound:
            return f"sequences that share a row see each other (relative error {error:.2g} to one alone)", error
        if self._dtype(states).itemsize == 2:
            others = self._states(torch.cat([self.other_first, self.second])[None], packed)
            moved = max(float(_row_errors(a[:, split:], b[:, split:]).max()) for a, b in zip(others, states))
            if not moved <= INFLUENCE_BOUND:
                return (
                    f"sequences that share a row see each other (other tokens in one move the next by {moved:.2g})",
                    moved,
                )
        return "", error

    def _shared(self, alone: list[Tensor]) -> None:
        """Two sequences that go on from one beginning, against each alone."""
        common, split, device = LENGTHS[1] // 2, LENGTHS[0], self.parts.device
        other = torch.cat([self.first[:common], self.second])
        states = self._states(
            torch.cat([self.first, self.second])[None], pack((split - common, len(self.second)), device, common)
        )
        error = max(
            self._distance([s[:, :split] for s in states], alone),
            self._distance([s[:, split:] for s in states], [s[:, common:] for s in self._states(other[None])]),
        )
        bound = ROW_BOUNDS[self._dtype(alone)]
        self.proof.shares = error <= bound
        self.proof.checks.append(Check("shared beginnings = own", error, bound, self.proof.shares))

    def _dtype(self, states: list[Tensor]) -> torch.dtype:
        """The coarsest that the pass computes in."""
        dtype = self.parts.autocast or states[0].dtype
        if dtype == torch.float32 and self.parts.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            return torch.float16  # TF32 keeps as many bits
        return dtype

    def _distance(self, states: list[Tensor], expected: list[Tensor]) -> float:
        narrow = self._dtype(expected).itemsize == 2
        errors = [_row_errors(a, b) for a, b in zip(states, expected)]
        return max(float(rows.median() if narrow else rows.max()) for rows in errors)


def _mark(called: dict[str, bool], name: str, output: Tensor) -> Tensor:
    called[name] = True
    return output


def _tokens(length: int, vocabulary: int, start: int) -> Tensor:
    """Different ids from the lower part of the vocabulary, where ordinary tokens are."""
    return (start + 37 * torch.arange(length)) % max(1, min(vocabulary, 997) - 3) + min(3, vocabulary - 1)


def _row_errors(states: Tensor, expected: Tensor) -> Tensor:
    a, b = (x.reshape(-1, x.shape[-1]).double() for x in (states, expected))
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)


def _own_pass(
    causal: CausalLM, head: Head | None, ids: Tensor, hidden: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The model's own hidden states and logits, and the logits that ``head`` gives on the last hidden state, all of one
    pass.

    Behind the half of the rows both heads' linear part is replaced by the same pattern.
    """
    half = ids.shape[1] // 2

    def with_pattern(logits: Tensor, factor: float = 1.0) -> Tensor:
        logits = logits.clone()
        ramp = torch.linspace(-PATTERN, PATTERN, logits.shape[-1], device=logits.device)
        logits[:, half:] = (ramp * factor).to(logits.dtype)
        return logits

    called: list[bool] = []

    def counted(logits: Tensor) -> Tensor:
        called.append(True)
        return with_pattern(logits)

    with output_through(causal.get_output_embeddings() if head is not None else None, counted):
        output = causal(input_ids=ids, use_cache=False, output_hidden_states=True)
    if head is None:
        return tuple(output.hidden_states or ()), output.logits, output.logits
    head = head.on(hidden.device)
    if head.weight.shape[1] != hidden.shape[-1]:
        raise UserError(
            f"the output head reads states of width {head.weight.shape[1]}, and the last hidden state has "
            f"{hidden.shape[-1]}; {WITHOUT_HEAD}"
        )
    linear = torch.nn.functional.linear(head.inputs(hidden), head.weight.to(hidden.dtype), head.bias)
    # A family's scale may stand behind the linear layer, where the pattern goes through it, or in front.
    found = []
    for factor in {head.scale or 1.0, 1.0}:
        expected = with_pattern(linear, factor) if called else linear
        found.append(head.softcap * torch.tanh(expected / head.softcap) if head.softcap else expected)
    states = tuple(output.hidden_states or ())
    if found[0].shape != output.logits.shape:
        return states, output.logits, found[0]
    return states, output.logits, min(found, key=lambda ours: float((ours - output.logits).norm()))


def _head_check(kind: str, got: Tensor, expected: Tensor) -> Check:
    """Compare logits [1, T, V], real rows and pattern apart.

    Raises:
        UserError: they differ.
    """
    error_bound, scale_bound = HEAD_BOUNDS[expected.dtype]
    worst = 0.0
    what = "" if got.shape == expected.shape else f"their shape is {tuple(got.shape)}, not {tuple(expected.shape)}"
    half = got.shape[1] // 2
    for rows in () if what else (slice(0, half), slice(half, None)):
        theirs, ours = got[:, rows].double().flatten(), expected[:, rows].double().flatten()
        error = float((theirs - ours).norm() / ours.norm().clamp_min(1e-30))
        scale = float(theirs @ ours / (ours @ ours).clamp_min(1e-30))
        worst = max(worst, error)
        if not (error <= error_bound and abs(scale - 1) <= scale_bound):
            what = what or f"relative error {error:.2g}, scale {scale:.4g}"
    if what:
        raise UserError(
            f"model type {kind} transforms its logits in a way that the shared-head KL does not know ({what}); "
            f"{WITHOUT_HEAD}"
        )
    return Check("head = logits", worst, error_bound, True)


@torch.no_grad()
def check_head(model: CausalLM, head: Head) -> None:
    """Compare ``head`` with the model's own logits on a few tokens: some families scale logits in ways a config hides.

    Raises:
        UserError: they differ.
    """
    causal, decoder = causal_model(model), find_decoder(model)
    ids = _tokens(LENGTHS[0], head.weight.shape[0], 11)[None].to(decoder.device)
    hidden = decoder.body(input_ids=ids, use_cache=False).last_hidden_state
    _, got, expected = _own_pass(causal, head, ids, hidden)
    _head_check(causal.config.model_type, got, expected)
