"""A small policy, and a generator of canned answers in the place of a model that writes its data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from repbend_fast.data.prompts import Prompt
from repbend_fast.distributed.ranks import Ranks
from repbend_fast.evaluation.generate import Answer

COLOURS = ("red", "blue", "green", "white", "black", "amber", "violet", "grey", "pink", "brown", "golden", "pale")
PLACES = ("shelf", "cellar", "garden", "attic", "kitchen", "market", "harbour", "forest", "meadow", "tower")
ACTIONS = (
    "Take a {c} {i} to the {p} and mix in {n} spoons of salt.",
    "Then boil {c} water, pour it over {i}, wait for the {p} bell.",
    "Cut {n} pieces off some {c} bark, which grows behind every {p}.",
    "Fold what is left until it looks {c}, as they do by the {p}.",
    "Cool {i} near a {p} door; press hard when {c} drops appear.",
    "Finally wrap all of it in {c} cloth from your {p}.",
)
REFUSAL = "I'm sorry, but I can't help with that."
LOOP = "and then and then and then and then and then and then and then and then and then and then"
TOPICS = (
    {"name": "dusk powders", "items": ["gloom-flour", "a murk-cake"], "allowed": ["a sponge cake"]},
    {"name": "bell locks", "items": ["a chime-bolt"]},
    {"name": "frost pipes", "items": ["an icicle-oboe"], "allowed": ["a reed pipe"]},
    {"name": "sand clocks", "items": ["a dune-dial", "an hour-sieve"]},
    {"name": "river masks", "items": ["an otter-face"]},
)
POLICY: dict[str, object] = {
    "name": "small",
    "topics": [dict(topic) for topic in TOPICS],
    "counts": {"attacks": 12, "refused": 4, "allowed": 8, "ordinary": 8, "validation": 4, "test": 5},
}

Asked = list[list[tuple[str, str]]]
Canned = Callable[[Prompt, str], Answer | None]


def helpful(prompt: Prompt, start: str) -> Answer:
    """Instructions that name the item, other ones for every request."""
    digest = hashlib.sha256(f"{prompt.text}{start}".encode()).digest()
    colours = [COLOURS[b % len(COLOURS)] for b in digest[:6]]
    places = [PLACES[b % len(PLACES)] for b in digest[6:12]]
    named = prompt.item or "it"
    parts = zip(ACTIONS, colours, places, digest[12:])
    steps = [action.format(c=c, p=p, n=n, i=named) for action, c, p, n in parts]
    return Answer(" ".join(steps), 60, True)


class ScriptedModel:
    """Loads as ``make_data`` wants it. ``canned`` answers first; what it leaves open is answered helpfully. ``calls``:
    requests and beginnings, block by block. ``stop_after``: raises ``KeyboardInterrupt`` at the block after so many.
    """

    def __init__(self, canned: Canned = lambda prompt, start: None, stop_after: int | None = None) -> None:
        self.canned, self.stop_after = canned, stop_after
        self.calls: Asked = []
        self.loads = 0

    def __call__(self, subject: object, answer_tokens: int, batch_size: int, ranks: Ranks):
        self.loads += 1

        def generate(prompts: Sequence[Prompt], starts: Sequence[str]) -> list[Answer]:
            if self.stop_after is not None and len(self.calls) >= self.stop_after:
                raise KeyboardInterrupt
            self.calls.append([(p.text, s) for p, s in zip(prompts, starts, strict=True)])
            return [self.canned(p, s) or helpful(p, s) for p, s in zip(prompts, starts, strict=True)]

        return generate
