"""What a run trains on and what it is validated on, ready before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from repbend_fast.config.schema import Config, TrainingConfig
from repbend_fast.data.encoded import dropped_reasoning, encode_records
from repbend_fast.data.formats import formats_that_give
from repbend_fast.data.records import PairSequence, Record, Role, Sequence, has_earlier_turns
from repbend_fast.data.sampling import BatchSampler, split_holdout
from repbend_fast.data.sources import load_records
from repbend_fast.data.tokenize import ChatEncoder, Truncated
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError
from repbend_fast.objectives.sections import RefusalConfig


@dataclass
class RunData:
    """``held``: held-out sequences by role, in a fixed order; empty with validation off.

    ``chat``: conversations for the evaluation before and after. ``notes`` are lines for the user.
    """

    encoder: ChatEncoder
    sampler: BatchSampler
    held: dict[Role, list[Sequence | PairSequence]]
    chat: list[Sequence]
    notes: list[str]


def prepare_data(config: Config, tokenizer: Tokenizer, wanted: tuple[Role, ...]) -> RunData:
    """Load, hold out, encode and set up the sampler.

    A stream that reads two roles (``safe`` or ``unsafe``, and ``pair``) is content with one of them, with a note.

    Raises:
        UserError: bad records, an unusable template, or no records for a stream that the objective needs.
    """
    data = config.data
    refusing = _refusing(config)
    encoder = ChatEncoder(
        tokenizer,
        data.max_prompt_tokens,
        data.max_answer_tokens,
        data.chat_template_kwargs,
        earlier_turns=config.objective.reads_turns,
        separator=refusing.recovery_separator if refusing else "",
    )
    loaded = load_records(config.data, seed=config.training.seed, skip_bad_records=config.data.skip_bad_records)
    notes = [loaded.summary()]
    records, held = loaded.records, {}
    validation = config.validation
    if validation.every and validation.sources:
        held = load_records(
            validation.sources, seed=config.training.seed, skip_bad_records=config.data.skip_bad_records
        ).records
    elif validation.every:
        records, held = split_holdout(records, validation.holdout, config.training.seed)
    if held:
        notes.append(f"held out: {_counts(held)}")
    if held and not validation.sources:
        notes.append(f"left to train on, without records that share a prompt with a held-out one: {_counts(records)}")
    roles = _available(records, wanted, config, notes)
    training, grouped = config.training, config.data.group_by_length
    if not refusing:
        training = training.model_copy(update={"refusal_examples": None})
    encoded = encode_records(records, encoder)
    sampler = BatchSampler(encoded, training.sizes, training.seed, roles, grouped)
    sequences = {role: list(encoded) for role, encoded in encode_records(held, encoder).items()}
    chat = [s for s in _evaluation_chat(config, encoder) or sequences.get("retain", []) if isinstance(s, Sequence)]
    if config.objective.reads_turns and not any(map(has_earlier_turns, (*records["unsafe"], *records["safe"]))):
        notes.append(
            "objective.loss_mode=assistant_turns, but no safe or unsafe record has an earlier turn of the assistant: "
            "the answers alone are read"
        )
    notes += dropped_reasoning(records, encoder) + _repeated(records, roles, training)
    # From here on training counts: held-out records do not belong into the run's report of truncated examples.
    encoder.truncated = Truncated()
    return RunData(encoder, sampler, sequences, chat, notes)


def _evaluation_chat(config: Config, encoder: ChatEncoder) -> list[Sequence | PairSequence]:
    sources = config.evaluation.sources
    if not sources or config.evaluation.prompts is None:
        return []
    loaded = load_records(sources, seed=config.training.seed, skip_bad_records=config.data.skip_bad_records)
    if not loaded.records["retain"]:
        raise UserError("evaluation.sources: no `retain` records; perplexity and KL are measured on conversations")
    return list(encode_records(loaded.records, encoder)["retain"])


def _repeated(records: dict[Role, list[Record]], roles: tuple[Role, ...], training: TrainingConfig) -> list[str]:
    """A line for each role with fewer records than a micro-batch has examples."""
    own: dict[Role, str] = {"retain": "retain_examples", "pair": "refusal_examples"}
    notes = []
    for role in roles:
        key, examples = own.get(role, "examples"), training.sizes.of(role)
        key = key if getattr(training, key) else "examples"
        if (count := len(records[role])) < examples:
            there = f"there {'is' if count == 1 else 'are'} {count} {role} record{'' if count == 1 else 's'}"
            notes.append(
                f"training.{key}={examples}, but {there}: a micro-batch holds {'it' if count == 1 else 'some of them'} "
                "more than once"
            )
    return notes


def _counts(records: dict[Role, list[Record]]) -> str:
    return ", ".join(f"{len(of_role)} {role}" for role, of_role in records.items() if of_role) or "no records"


def _refusing(config: Config) -> RefusalConfig | None:
    """The objective, if its refusal term has a weight."""
    objective = config.objective
    return objective if isinstance(objective, RefusalConfig) and objective.refusal else None


def _available(
    records: dict[Role, list[Record]], wanted: tuple[Role, ...], config: Config, notes: list[str]
) -> tuple[Role, ...]:
    present = {role for role in wanted if records.get(role)}
    missing = [role for role in wanted if role not in present]
    if "pair" in present:
        optional = config.objective.replaceable
    else:
        optional = frozenset() if config.objective.needs_pairs else frozenset({"pair"})
    refusing = _refusing(config)
    if "pair" in missing and refusing:
        raise UserError(
            f"objective.refusal={refusing.refusal:g} teaches the safe answers of `pair` records, and "
            "data.sources has none; "
            f"add some (formats that give them: {formats_that_give('pair')}) or set objective.refusal=0"
        )
    dropped = [role for role in missing if role in optional]
    unsafe_per_batch = config.training.examples * len(present & {"unsafe", "pair"})
    if config.objective.compares_unsafe and 0 < unsafe_per_batch < 2:
        raise UserError(
            f"training.examples={config.training.examples}: objective.cosine compares at least two unsafe sequences of "
            "a micro-batch; "
            "raise it to 2, add pair records, or set objective.cosine=0 with objective.pair above 0"
        )
    if dropped:
        notes.append(f"no {' and no '.join(dropped)} records: the streams that read them go on without")
    return tuple(role for role in wanted if role not in dropped)
