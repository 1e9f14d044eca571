"""Everything that can be refused before weights are loaded, the cheapest questions first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repbend_fast.config import Config
from repbend_fast.console import say
from repbend_fast.data.prompts import Prompt, load_prompts
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, load_tokenizer
from repbend_fast.models.adapters import check_targets
from repbend_fast.models.causal import Shape
from repbend_fast.models.gguf import gguf_blocks
from repbend_fast.models.load import check_attention, read_model_config, resolve_device, resolve_source
from repbend_fast.objectives import build_objective, roles_of
from repbend_fast.planning.batches import limits_of_sets
from repbend_fast.planning.planner import Plan, plan_of
from repbend_fast.runs.folder import RunFolder, check_folder
from repbend_fast.runs.prepare import RunData, prepare_data
from repbend_fast.runs.tracking import check_trackers
from repbend_fast.training.checkpoint import intact_checkpoint, read_state
from repbend_fast.training.optimizer import check_optimizer


@dataclass(frozen=True)
class Ready:
    """What a run has before its model: data, validation prompts, the checkpoint to go on from, and the plan for its
    memory budget.
    """

    data: RunData
    prompts: list[Prompt]
    checkpoint: Path | None
    plan: Plan | None = None


def prepare_run(config: Config, run: RunFolder, resume: bool, processes: int = 1) -> Ready:
    """Check folder, checkpoint, device, optimizer, prompts, template, records, window and memory budget; read the data.
    Each of ``processes`` has its share of a micro-batch to keep within the budget.

    Raises:
        UserError: the first thing to mend.
    """
    checkpoint, damaged = intact_checkpoint(run) if resume else (None, [])
    for note in damaged:
        say(note)
    state = None
    if not resume:
        check_folder(run)
    elif checkpoint is None:
        raise UserError(f"{run.path}: no checkpoint to resume from; train without --resume")
    else:
        state = read_state(checkpoint, config)
    check_trackers(config)
    check_optimizer(config.training, resolve_device(config.model.device))
    prompts = load_prompts(config.validation.prompts) if config.validation.every and config.validation.prompts else []
    if (
        config.validation.prompts
        and prompts
        and config.validation.target_attack is not None
        and not any(prompt.kind == "attack" for prompt in prompts)
    ):
        raise UserError(
            f"validation.target_attack={config.validation.target_attack:g}: validation.prompts "
            f"({config.validation.prompts.path}) has no "
            "attacks to measure it; add some or set it to null"
        )
    if config.evaluation.prompts:
        load_prompts(config.evaluation.prompts)
    check_depth(config)
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    if state is not None:
        data.sampler.load_state_dict(state.sampler)
    if config.validation.every and not prompts and not data.held.get("retain"):
        data.notes.append("validation has neither retain records nor prompts: it cannot see what ordinary answers lose")
    if config.validation.every and not prompts and _sees_no_bending(config, data):
        raise UserError(
            "validation.sources: no unsafe or pair records, and validation.prompts is not set, so that no adapter "
            "would look better than "
            "none and the untrained one would be kept; name records or prompts, or set validation.every=0"
        )
    return Ready(data, prompts, checkpoint, _plan(config, data, processes))


def _sees_no_bending(config: Config, data: RunData) -> bool:
    """Whether the objective bends records of which none is held out."""
    bent = {"unsafe", "pair"} & set(roles_of(config.objective))
    return bool(bent) and not any(data.held.get(role) for role in ("unsafe", "pair"))


def _plan(config: Config, data: RunData, processes: int) -> Plan | None:
    if config.memory.budget is None:
        return None
    training = config.training
    counts = {key: getattr(training, key) for key in ("examples", "retain_examples", "refusal_examples")}
    share = {key: count and -(-count // processes) for key, count in counts.items()}
    config = config.model_copy(update={"training": training.model_copy(update=share)})
    return plan_of(config, resolve_device(config.model.device), limits_of_sets(data.sampler.sets, config))


def check_depth(config: Config) -> None:
    """Compare window, LoRA blocks and attention with the model's own configuration file; of a GGUF file the depth
    alone.

    Raises:
        UserError: a window or a block beyond the model's layers, an attention that leaves out what the model needs.
    """
    if config.model.gguf_file:
        depth = gguf_blocks(Path(resolve_source(config.model)) / config.model.gguf_file)
        if depth is not None:
            _check_blocks(config, depth)
        return
    try:
        whole = read_model_config(config.model)
        shape = whole.get_text_config()
        blocks = shape.num_hidden_layers
    except (OSError, ValueError, KeyError, AttributeError):
        return  # loading the model says what is wrong with it
    check_attention(shape, config.model)
    _check_blocks(config, blocks)
    _check_layers(config, whole)


def _check_blocks(config: Config, blocks: int) -> None:
    build_objective(config.objective, blocks, config.training.steps)
    if isinstance(config.lora.blocks, list) and max(config.lora.blocks) >= blocks:
        raise UserError(f"lora.blocks={config.lora.blocks}: the model has blocks 0 … {blocks - 1}")


def _check_layers(config: Config, shape: Shape) -> None:
    """What only the model's layers tell: its list of blocks and its linear layers. They are built without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.model.trust_remote_code)
    except Exception:  # whatever a family's own constructor may raise: loading says what is wrong with it
        return
    find_decoder(model)
    check_targets(model, config.lora)
