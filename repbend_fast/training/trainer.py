"""The training loop of one run: prepare, bend, guard, save, evaluate."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repbend_fast.config import Config, resolved_yaml
from repbend_fast.config.schema import at_depth
from repbend_fast.console import ProgressLine, say, saying
from repbend_fast.data.prefetch import PreparedBatches
from repbend_fast.distributed.joining import joined
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.evaluation.rates import rates_line
from repbend_fast.evaluation.sides import evaluate_sides
from repbend_fast.models import (
    attach_lora,
    find_decoder,
    load_model,
    trainable_parameters,
)
from repbend_fast.models.adapters import settled_lora
from repbend_fast.models.load import DTYPES
from repbend_fast.objectives import Stream, build_objective
from repbend_fast.objectives.normalize import over_step
from repbend_fast.planning.planner import Plan, show_plan
from repbend_fast.runs.folder import RunFolder, only_writer, start_folder, write_json, write_text
from repbend_fast.runs.metrics import MetricsLog, NoLog, peak_memory_bytes
from repbend_fast.runs.prepare import RunData
from repbend_fast.runs.token_ids import check_token_ids
from repbend_fast.runs.tracking import TrackedLog
from repbend_fast.step import StreamResult, checked_runner, dropout_seed
from repbend_fast.step.levers import Levers, levers_of
from repbend_fast.step.retreat import is_out_of_memory, optimizer_out_of_memory
from repbend_fast.step.units import measure_units
from repbend_fast.step.zero_start import check_zero, is_at_start, probe_of
from repbend_fast.training.checkpoint import (
    adapter_weights,
    load_adapter_weights,
    save_adapter,
    save_checkpoint,
)
from repbend_fast.training.dual import KLWeight
from repbend_fast.training.guard import Guard
from repbend_fast.training.interrupt import Interrupt
from repbend_fast.training.kept_folder import keep_folder
from repbend_fast.training.optimizer import build_optimizer, learning_rate
from repbend_fast.training.preflight import Ready, prepare_run
from repbend_fast.training.resume import place_of, resume_training, state_of
from repbend_fast.training.rounded_steps import is_rounded, weights_of_step
from repbend_fast.training.together import add_up_gradients, check_alike
from repbend_fast.training.validation import Validation, Validator

INTERRUPTED = 130


@dataclass(frozen=True)
class RunResult:
    """Where the run lies, and the process's exit code: 0, or 130 after Ctrl-C or SIGTERM."""

    folder: Path
    exit_code: int


def train(config: Config, resume: Path | None = None) -> RunResult:
    """Run ``config`` from the start, or go on with the latest checkpoint of the folder ``resume``.

    Raises:
        UserError: anything that the user can mend; earlier checkpoints stay intact.
    """
    run = RunFolder(resume if resume is not None else config.output.folder)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(config.model.device, config.distributed.shard == "fsdp"))
        # The first process alone writes to the folder and speaks.
        stack.enter_context(only_writer(run) if ranks.first else saying(None))
        ready = make_ready(config, run, resume is not None, ranks.count)
        check_alike(ranks, config, ready.data)
        try:
            return _run(config, run, ready, ranks)
        except KeyboardInterrupt:
            if run.latest_checkpoint() is not None:
                say(f"stopped; what was saved stays. {resume_line(run)}")
            raise


def make_ready(config: Config, run: RunFolder, resume: bool, processes: int = 1) -> Ready:
    """What a run of so many ``processes`` has before its model, with the notes and the plan said.

    Raises:
        UserError: as ``prepare_run``.
    """
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    ready = prepare_run(config, run, resume, processes)
    for note in ready.data.notes:
        say(note)
    if ready.plan is not None:
        say(show_plan(ready.plan))
    return ready


def make_trainer(config: Config, run: RunFolder, ready: Ready, ranks: Ranks = ALONE) -> Trainer:
    """The trainer with its model, LoRA's start drawn from the run's seed."""
    torch.manual_seed(config.training.seed)
    return Trainer(config, run, ready.data, ready.plan.levers if ready.plan else None, ranks)


def _run(config: Config, run: RunFolder, ready: Ready, ranks: Ranks) -> RunResult:
    trainer = make_trainer(config, run, ready, ranks)
    validator = None
    if config.validation.every:
        validator = Validator(
            trainer.runner, trainer.objective, ready.data.encoder, ready.data.held, ready.prompts, config
        )
    if ready.checkpoint is None:
        moved = start_folder(run) if ranks.first else None
        if moved:
            say(f"an earlier run was in {run.path}; it is now in {moved}")
        if ranks.first:
            write_text(run.config, resolved_yaml(trainer.config))
        trainer.log = TrackedLog(trainer.config, run) if ranks.first else NoLog()
        trainer.log_plan(ready.plan)
        trainer.log_proof()
        trainer.use_units({})
        evaluate_sides(run, config, trainer.runner, ready.data, "before")
    else:
        resume_training(trainer, ready.checkpoint)
    try:
        if trainer.fit(validator):
            return RunResult(run.path, INTERRUPTED)
        trainer.finish()
    finally:
        trainer.log.close()
    return RunResult(run.path, 0)


def resume_line(run: RunFolder) -> str:
    """What to type to go on."""
    return f"resume with: repbend-fast train --resume {shlex.quote(str(run.path))}"


class Trainer:
    """State of a run and its loop. ``step`` counts finished optimizer steps.

    ``levers``: those of the plan for the memory budget; None = as set by hand. ``ranks``: the processes that train
    together.
    """

    def __init__(
        self, config: Config, run: RunFolder, data: RunData, levers: Levers | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.run = run
        self.data = data
        self.batches = PreparedBatches(data.sampler)
        # What is divided is never whole on the device.
        whole_on = {"device": "cpu", "liger": False} if ranks.lockstep else {}
        base = load_model(config.model.model_copy(update=whole_on))
        num_blocks = find_decoder(base).num_blocks
        config = at_depth(config, num_blocks)
        self.config = config = config.model_copy(update={"lora": settled_lora(base, config.lora)})
        self.objective = build_objective(config.objective, num_blocks, config.training.steps, config.training.seed)
        self.kl_weight = KLWeight.of(config.objective)
        self.model = attach_lora(base, config.lora, (self.objective.last_state,))
        needs_head = self.objective.uses_head or bool(data.held.get("retain") or data.chat)
        planned = levers
        levers = levers or levers_of(config.memory, self.model)
        self.runner = checked_runner(
            self.model, config, ranks.same(levers) if ranks.lockstep else levers, needs_head, ranks
        )
        if planned and self.runner.proof and planned.packing != self.runner.levers.packing:
            self.runner.proof.notes.append(
                "note: the plan for memory.budget counts on packing, and padding may take more; memory.packing=off "
                "plans for it"
            )
        self.runner.on_out_of_memory = self._say_out_of_memory
        self.proof = self.runner.proof
        unused = check_token_ids(self.model, data)
        for line in (self.proof.line() if self.proof else None, *(self.proof.notes if self.proof else ()), unused):
            if line:
                say(line)
        self.first_levers = self.runner.levers
        self.parameters = trainable_parameters(self.model)
        ranks.spread_(self.parameters)
        self.optimizer = build_optimizer(self.parameters, config.training)
        # Half precision loses small gradients below its range; bfloat16 and float32 do not need this.
        half = DTYPES[config.model.dtype] == torch.float16
        self.scaler = torch.amp.GradScaler(self.runner.device.type, enabled=half)
        # The scaler makes its state when it first scales something, which here is each stream's own loss in the runner.
        self.scaler.scale(torch.zeros((), device=self.runner.device))
        self.guard = Guard(config.validation)
        self.yardstick: dict[str, object] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.step = 0
        self.stopped: str | None = None
        self.log: MetricsLog

    def fit(self, validator: Validator | None) -> bool:
        """Train to ``training.steps`` or until the guard stops. Returns whether Ctrl-C interrupted it."""
        settings = self.config.training
        if validator and self.guard.before is None:
            self._validate(validator)
        with Interrupt(self.ranks.several) as interrupt, ProgressLine(settings.steps, self.step) as progress:
            while self.step < settings.steps and self.stopped is None:
                self._train_step(progress)
                last = self.step == settings.steps
                if validator and (self._validation_is_due() or last or self.guard.is_annealed(self.step)):
                    self._validate(validator)
                interrupted, gone = self.ranks.any(interrupt.requested), keep_folder(self)
                if self.step % settings.checkpoint_every == 0 or last or self.stopped or interrupted or gone:
                    path = self.run.checkpoint(self.step)
                    if self.ranks.first:
                        save_checkpoint(self.run, state_of(self), self.model, settings.keep_checkpoints, place_of(self))
                    if interrupted:
                        self.log.write(
                            "event", self.step, event="interrupted", reason=interrupt.reason or "another process"
                        )
                        say(f"saved {path}\n{resume_line(self.run)}")
                        return True
        return False

    def _validation_is_due(self) -> bool:
        settings = self.config.validation
        return self.step >= settings.start and self.step % settings.every == 0

    def _say_annealing(self, anneal: range) -> None:
        stop = min(anneal.stop, self.config.training.steps)
        reason = f"{self.guard.target_line}; the learning rate falls to 0 at step {stop}, where the run ends"
        self.log.write("event", self.step, event="annealing", reason=reason)
        say(reason)

    def _learning_rate(self) -> float:
        """That of the next step."""
        return learning_rate(self.config.training, self.step, self.guard.anneal)

    def log_plan(self, plan: Plan | None) -> None:
        """Record what was planned for the memory budget."""
        if plan is not None:
            line = show_plan(plan)
            self.log.write(
                "event",
                self.step,
                event="memory_plan",
                reason=line,
                levers=plan.levers.as_dict(),
                planned_bytes=plan.total,
            )

    def use_units(self, known: dict[int, float]) -> None:
        """Measure the units that the objective's distances count in, where it asks for any, and keep them in the run's
        folder.
        """
        if not self.config.objective.counts_in_reference:
            return
        units = self.ranks.same(measure_units(self.runner, self.objective, self.data.sampler.sets, known))
        self.runner.units.update(units)
        if units != known:
            shown = ", ".join(f"{layer}: {unit:.4g}" for layer, unit in units.items())
            self.log.write(
                "event", self.step, event="units", reason=f"lengths that count as 1, by hidden state: {shown}"
            )
        self.write_units()

    def write_units(self) -> None:
        """Keep the units in the run's folder, if there are any."""
        if self.runner.units and self.ranks.first:
            write_json(self.run.units, {str(layer): unit for layer, unit in self.runner.units.items()})

    def log_proof(self) -> None:
        """Record what was shown for the model at load."""
        if self.proof is not None:
            self.log.write("event", self.step, event="model_checked", reason=self.proof.line(), **self.proof.as_dict())

    def finish(self) -> None:
        """Make the best adapter the run's result, evaluate it, write the report."""
        self.batches.close()
        if self.best_weights is not None:
            load_adapter_weights(self.model, self.best_weights)
        if self.ranks.first:
            save_adapter(self.model, self.run.adapter)
        best = self.guard.best.step if self.guard.best else self.step
        reason = self.stopped or f"all {self.step} steps done"
        kept = (
            f"the adapter of step {best} is kept" if self.guard.best else "the last adapter is kept (validation is off)"
        )
        self.log.write("event", self.step, event="finished", reason=f"{reason}; {kept}")
        say(f"{reason}; {kept}: {self.run.adapter}")
        if self.guard.best and best == 0:
            say(
                "note: no bent adapter was both within validation's limits and better than none, so the kept one "
                "leaves the model as it was"
            )
        counts = self.data.encoder.truncated.as_dict()
        if any(counts.values()):
            say("truncated: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        evaluate_sides(self.run, self.config, self.runner, self.data, "after", best_step=best)
        if self.config.output.report and self.ranks.first:
            from repbend_fast.report import write_report

            say(f"report: {write_report(self.run.path)}")

    def _train_step(self, progress: ProgressLine) -> None:
        settings = self.config.training
        started = time.perf_counter()
        ran: list[Stream] = []
        results: list[StreamResult] = []
        scale = self.scaler.get_scale() / settings.accumulation
        with weights_of_step(self.config, self.step + 1, self.runner):
            for micro_batch, streams in enumerate(self._micro_batches()):
                if self.kl_weight:
                    streams = [self.kl_weight.weigh(stream) for stream in streams]
                ran += streams
                seed = dropout_seed(settings.seed, self.step, micro_batch)
                done = self.runner.backward_all(streams, scale, dropout_seed=seed)
                if self.step == micro_batch == 0 and is_at_start(self.model):
                    self._check_zero(streams, done, seed)
                results += done
        add_up_gradients(self.ranks, self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm or math.inf)
        # The step's one wait for the device (bitsandbytes' optimizers add theirs): a non-finite gradient must not reach
        # the weights.
        kl = self.kl_weight.measured(ran, results, settings.accumulation) if self.kl_weight else None
        kl_now = self._check_finite(results, norm, kl)
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        extra: dict[str, float | bool] = {"nf4": True} if is_rounded(self.config, self.step) else {}
        if self.kl_weight and kl_now is not None:
            extra["kl_weight"] = self.kl_weight.value  # of this step; the next one's follows
            self.kl_weight.update(kl_now)
        if self.step % settings.log_every and self.step != settings.steps:
            return
        seconds = time.perf_counter() - started
        tokens = sum(r.tokens for r in results)
        results, norm_now = _on_host(results, norm)
        terms, layers = _mean_terms(results, settings.accumulation)
        loss = sum(float(r.loss) for r in results) / settings.accumulation
        self.log.write(
            "step",
            self.step,
            loss=loss,
            terms=terms,
            distance_per_layer=layers,
            grad_norm=norm_now,
            learning_rate=rate,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(self.runner.device),
            **extra,
        )
        progress.update(self.step, loss, terms, tokens / seconds)

    def _micro_batches(self) -> Iterable[list[Stream]]:
        """The streams of the step's micro-batches: one after the other, or all at once where their denominators are the
        step's.
        """
        settings = self.config.training
        left = (settings.steps - self.step) * settings.accumulation
        whole = settings.normalize == "step"
        ahead = settings.accumulation if whole else 1
        drawn = (
            self.objective.streams(self.batches.next_batch(ahead=min(ahead, left - done - 1)), self.step)
            for done in range(settings.accumulation)
        )
        return over_step(list(drawn)) if whole else drawn

    def _check_zero(self, streams: list[Stream], results: list[StreamResult], seed: int) -> None:
        for stream, result in zip(streams, results):
            check_zero(stream, result)
        found = (probe_of(stream, self.runner.decoder.num_blocks) for stream in streams)
        probes = [probe for probe in found if probe is not None]
        for probe, result in zip(probes, self.runner.backward_all(probes, dropout_seed=seed)):
            check_zero(probe, result)

    def _update(self) -> None:
        try:
            self.scaler.step(self.optimizer)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise optimizer_out_of_memory(self.step + 1, self.config.training.optimizer) from error
        self.scaler.update()

    def _say_out_of_memory(self, line: str, allocator: str) -> None:
        self.log.write(
            "event",
            self.step,
            event="out_of_memory",
            reason=line,
            allocator=allocator,
            levers=self.runner.levers.as_dict(),
        )
        say(line)

    def _check_finite(self, results: list[StreamResult], norm: Tensor, kl: Tensor | None = None) -> float | None:
        """Refuse a step that is not finite. Returns the value of ``kl``, read in the same wait."""
        values = [r.loss for r in results]
        # Overflowed gradients only make the scaler skip the step and halve its scale; at a scale of 1 there is nothing
        # left to halve.
        if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            values.append(norm.to(values[0]))
        finite = torch.isfinite(torch.stack(values)).all()
        if kl is None:
            if bool(finite):
                return None
        elif not math.isnan(value := float(torch.where(finite, kl, math.nan))):
            return value
        bad = sorted({name for r in results for name, value in r.terms.items() if not math.isfinite(float(value))})
        what = f"the loss is not finite (term {', '.join(bad)})" if bad else "the gradient is not finite"
        self.log.write("event", self.step, event="not_finite", reason=what)
        raise UserError(f"step {self.step + 1}: {what}; {self._way_back()}")

    def _way_back(self) -> str:
        """Where to go on after a step that failed. A checkpoint whose very next step failed may hold the weights that
        made it fail.
        """
        kept = self.run.all_checkpoints()
        suspect = kept[-1] if kept and kept[-1] == self.run.checkpoint(self.step) else None
        good = [path for path in kept if path != suspect]
        lower = "lower training.learning_rate or the term's weight"
        if not good:
            return f"no checkpoint before it is known to be good; {lower} and start again"
        return f"last good checkpoint: {good[-1]}; {f'remove {suspect.name}, ' if suspect else ''}{lower} and resume"

    def _validate(self, validator: Validator) -> None:
        self.batches.wait()  # validation uses the same tokenizer
        validation = self.ranks.same(validator.measure(self.step))
        was_annealing = self.guard.anneal is not None
        self.guard.judge(validation, rate_is_zero=self._learning_rate() == 0)
        self.stopped = self.guard.stop_reason(validation)
        if validation.best:
            self.best_weights = adapter_weights(self.model)
            if self.ranks.first:
                save_adapter(self.model, self.run.adapter)
        self.log.write("validation", **validation.row() | {"step": self.step})
        say(_validation_line(validation))
        if self.guard.anneal and not was_annealing and not self.stopped and self.step < self.config.training.steps:
            self._say_annealing(self.guard.anneal)
        if self.stopped:
            self.stopped = f"stopped at step {self.step}: {self.stopped}"
            self.log.write("event", self.step, event="guard_stop", reason=self.stopped)


def _on_host(results: list[StreamResult], norm: Tensor) -> tuple[list[StreamResult], float]:
    """The results with their scalars on the host, and the norm, all read in one wait for the device."""
    layers = [value for r in results for by_layer in r.layers.values() for value in by_layer.values()]
    scalars = [norm, *(r.loss for r in results), *(value for r in results for value in r.terms.values()), *layers]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in scalars) else torch.float32
    read = iter(torch.stack([value.detach().to(norm.device, dtype) for value in scalars]).cpu().unbind())
    found = float(next(read))
    losses = [next(read) for _ in results]
    terms = [{name: next(read) for name in r.terms} for r in results]
    by_layers = [{name: {layer: next(read) for layer in of} for name, of in r.layers.items()} for r in results]
    parts = zip(results, losses, terms, by_layers, strict=True)
    return [StreamResult(loss, of, by_layer, result.tokens) for result, loss, of, by_layer in parts], found


def _mean_terms(results: list[StreamResult], accumulation: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    terms: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    for result in results:
        for name, value in result.terms.items():
            terms[name] = terms.get(name, 0.0) + float(value) / accumulation
        for name, by_layer in result.layers.items():
            sums = layers.setdefault(name, {})
            for layer, value in by_layer.items():
                sums[str(layer)] = sums.get(str(layer), 0.0) + float(value) / accumulation
    return terms, layers


def _validation_line(v: Validation) -> str:
    parts = [f"validation at step {v.step}:"]
    if v.kl is not None and v.perplexity is not None:
        parts.append(f"kl {v.kl:.4f}  perplexity {v.perplexity:.2f}")
    if v.rates:
        parts.append(rates_line(v.rates))
    parts.append("OVER: " + "; ".join(v.over) if v.over else "within limits" + (", best so far" if v.best else ""))
    return "  ".join(parts)
