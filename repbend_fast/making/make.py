"""From a policy and a model to a data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from repbend_fast.assessment.answers import RowFile
from repbend_fast.assessment.target import Subject, find_subject, limit_prompts, load_base
from repbend_fast.config.overrides import Overlays, Overrides
from repbend_fast.console import CountLine, note, say, show
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message
from repbend_fast.distributed.joining import joined
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.environment import environment
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import Answer, generate_measured
from repbend_fast.making.answering import Answers, Generator, Rejected, answer
from repbend_fast.making.made_files import Made, Places, command, tables, write_all
from repbend_fast.making.policy import Policy, read_policy
from repbend_fast.making.refusals import refuse
from repbend_fast.making.sharing import asking, take_part
from repbend_fast.making.splits import divide
from repbend_fast.making.tasks import Work, work_of
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.load import resolve_device
from repbend_fast.runs.folder import RunFolder, only_writer, saving, write_json

FORMAT = 1
ENOUGH = 0.5
"""Share of the answers that are wanted, below which a user is told that something is amiss."""
Load = Callable[[Subject, int, int, Ranks], Generator]
"""The generator of a subject, for answers of so many tokens and so many prompts at once, by each of the processes."""


@dataclass(frozen=True)
class Request:
    """What to make. ``limit``: at most so many of everything, to look at first. ``seed`` replaces the policy's."""

    policy: str
    model: str
    out: Path
    batch_size: int
    limit: int | None = None
    seed: int | None = None
    overrides: Overrides = ()
    overlays: Overlays = ()


def make_data(request: Request, load: Load | None = None) -> Places:
    """Make a data set, or go on with one that was interrupted; asks nothing that has been answered.

    Of several processes (``torchrun``) the first does it all, and the others generate with it.

    ``load``: gives the generator in place of the model's own.

    Raises:
        UserError: anything that must be mended in the policy, the model or ``out``; a model whose answers are of no
            use. Answers that were given stay.
    """
    policy = read_policy(request.policy)
    if request.seed is not None:
        policy = replace(policy, config=policy.config.model_copy(update={"seed": request.seed}))
    work = work_of(policy, divide(policy), request.limit)
    subject = find_subject(request.model, None, request.overrides, overlays=request.overlays)
    places = Places(request.out)
    with joined(subject.config.model.device, shard=False) as ranks:
        sizes = policy.config.answer_tokens, request.batch_size
        generate = _when_needed(partial(load or model_generator, subject, *sizes, ranks))
        if not ranks.first:
            take_part(ranks, generate)
            return places
        with asking(ranks, generate) as ask:
            _make(policy, work, subject, ask, places, request.batch_size * ranks.count)
    return places


def _make(policy: Policy, work: Work, subject: Subject, generate: Generator, places: Places, block: int) -> None:
    """Makes the data and its files. ``block``: prompts that are asked together."""
    settings = _settings(policy, work, subject)
    with only_writer(RunFolder(places["answers.jsonl"]), "making of data", "give another --out"):
        _start(places, settings)
        made = _made(policy, work, generate, places, block)
        facts = {**settings, "environment": environment()}
        write_all(made, places, policy, subject.config, facts)
    for table in tables(made):
        show(table)
    say(f"wrote {places.out}; train on it with:\n{command(places)}")


def _settings(policy: Policy, work: Work, subject: Subject) -> dict[str, object]:
    """All that decides an answer. The work holds what the policy, its files and the bundled ones come to."""
    asked = [[task.key, task.prompt.text, task.starts, group.wanted] for group in work.groups for task in group.tasks]
    asked += [[task.key, task.prompt.text] for task in work.refused]
    return {
        "format": FORMAT,
        "policy": policy.config.name,
        "seed": policy.config.seed,
        "model": subject.config.model.model_dump(mode="json"),
        "chat_template_kwargs": subject.config.data.chat_template_kwargs,
        "answer_tokens": policy.config.answer_tokens,
        "refusals": policy.config.refusals.model_dump(mode="json"),
        "requests_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def _start(places: Places, settings: dict[str, object]) -> None:
    """Make the folder, or see that the answers that are in it were given under the same settings."""
    kept, rows = places["settings.json"], places["answers.jsonl"]
    there = [name for name in ("train.jsonl", "answers.jsonl") if places[name].exists()]
    taken = places.out.exists() and not places.is_file and (not places.out.is_dir() or any(places.out.iterdir()))
    if not kept.is_file() and (there or taken):
        raise UserError(f"{places.out}: exists and was not made by `data make`; give another --out")
    with saving("the data", places.folder):
        places.folder.mkdir(parents=True, exist_ok=True)
    if not kept.is_file() or not (rows.is_file() and rows.stat().st_size):  # nothing was answered under the old ones
        write_json(kept, settings)
        return
    try:
        stored = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{kept}: not the settings of `data make`; give another --out") from error
    for key, value in json.loads(json.dumps(settings)).items():
        if not isinstance(stored, dict) or stored.get(key) != value:
            raise UserError(
                f"{places.out}: was begun with another {key.replace('requests_sha256', 'policy or --limit')}; give "
                f"another --out, or remove {rows.name} and {kept.name} there to begin anew"
            )


def model_generator(subject: Subject, answer_tokens: int, batch_size: int, ranks: Ranks = ALONE) -> Generator:
    """The subject's own model, greedy; it is loaded now. Each of ``ranks`` has to be asked for the same answers."""
    model, encoder = load_base(_as_computed(subject))
    limit_prompts(model, encoder, answer_tokens)
    plain = [Message("user", "Hello.")]
    try:
        encoder.prompt_ids([Message("system", "Be brief."), *plain])
        takes_system = True
    except UserError:
        takes_system = False

    def generate(prompts: Sequence[Prompt], starts: Sequence[str]) -> list[Answer]:
        asked = prompts if takes_system else [_folded(prompt) for prompt in prompts]
        return generate_measured(
            model, encoder, asked, prefills=starts, max_new_tokens=answer_tokens, batch_size=batch_size, ranks=ranks
        )

    return generate


def _as_computed(subject: Subject) -> Subject:
    """The subject with weights of the dtype that a training's passes compute in: nothing is trained here, and a CPU
    that multiplies in bfloat16 is faster in it.
    """
    config = subject.config
    computed = autocast_dtype(config, resolve_device(config.model.device))
    if computed is None:
        return subject
    model = config.model.model_copy(update={"dtype": str(computed).removeprefix("torch.")})
    return replace(subject, config=config.model_copy(update={"model": model}))


def _when_needed(load: Callable[[], Generator]) -> Generator:
    """A generator that loads its model for the first prompts: a data set that is finished needs none."""
    loaded: list[Generator] = []

    def generate(prompts: Sequence[Prompt], starts: Sequence[str]) -> list[Answer]:
        if not loaded:
            loaded.append(load())
        return loaded[0](prompts, starts)

    return generate


def _folded(prompt: Prompt) -> Prompt:
    """A system message as the beginning of the request, for templates that have no place for one."""
    if prompt.messages is None or prompt.messages[0].role != "system":
        return prompt
    system, first, *rest = prompt.messages
    return replace(prompt, messages=(Message(first.role, f"{system.content}\n\n{first.content}"), *rest))


def _made(policy: Policy, work: Work, generate: Generator, places: Places, block: int) -> Made:
    made = Made(prompts=work.prompts)
    file = RowFile(places["answers.jsonl"], "a data set that is being made")
    wanted = sum(group.wanted for group in work.groups)
    with CountLine("answers", wanted) as progress:
        answers = Answers(file, generate, block, progress)
        if answers.known():
            say(f"{places.out}: {answers.known()} answers are there; going on with the rest")
        else:
            say(f"{policy.name}: the model is to write {wanted} answers; they go to {file.path} as they come")
        for group in work.groups:
            split, part = group.tasks[0].split, group.tasks[0].part
            good, rejected = answer(answers, group)
            made.rejected += rejected
            progress.end_part(f"{split} {part}")
            _check_enough(policy, f"{split} {part}", len(good), group.wanted, rejected)
            if part != "complying":
                made.add_kept(split, good)
                continue
            tasks = [written.task for written in good]
            tasks += work.refused if split == "train" else ()
            refusals, unfit = refuse(policy, answers, split, tasks)
            made.rejected += unfit
            made.add_complying(split, good, refusals[: len(good)])
            made.add_refused(split, [task.prompt.text for task in tasks[len(good) :]], refusals[len(good) :])
    return made


def _check_enough(policy: Policy, part: str, good: int, wanted: int, rejected: Sequence[Rejected]) -> None:
    if good == wanted:
        return
    reasons = Counter(one.reason.partition(":")[0] for one in rejected)
    why = f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""
    if not good:
        raise UserError(
            f"{policy.name}: none of the {wanted} answers for {part} is of use{why}; name a model that answers, or "
            "give other `starts` or a larger `answer_tokens`"
        )
    if good < ENOUGH * wanted:
        note(f"{part}: only {good} of {wanted} answers are of use{why}")
