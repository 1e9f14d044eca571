"""Template, special tokens and stop ids of an export beside those of the model that was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from repbend_fast.config.schema import ModelConfig
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.models.load import load_tokenizer

_SAMPLE = "Hello, world! 12345 naïve\n\n\tüber 東京"
_TALK = (
    {"role": "user", "content": "How warm is tea?"},
    {"role": "assistant", "content": "Rather."},
    {"role": "user", "content": _SAMPLE},
)
STOPS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_differences(trained: Tokenizer, folder: Path) -> list[str]:
    """What the tokenizer in ``folder`` does otherwise than the trained model's."""
    found = load_tokenizer(ModelConfig(name=str(folder)))
    lines = [
        f"{name} is {there}, and {here} in training"
        for name in STOPS
        if (there := getattr(found, name)) != (here := getattr(trained, name))
    ]
    if found.chat_template != trained.chat_template:
        lines.append("the chat template is another one")
    if any(
        found.encode(_SAMPLE, add_special_tokens=special) != trained.encode(_SAMPLE, add_special_tokens=special)
        for special in (True, False)
    ):
        lines.append("a sample text has other token ids")
    if not lines and trained.chat_template and _rendered(found) != _rendered(trained):
        lines.append("a conversation is rendered otherwise")
    return lines


def _rendered(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.apply_chat_template(_TALK, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything; both must raise alike
        return f"{type(error).__name__}: {error}"


def stop_differences(trained: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """What the generation settings in an export stop at, begin with or pad with that the base's do not."""
    return [
        f"generation's {name} is {found.get(name)}, and {trained.get(name)} in the base"
        for name in STOPS
        if _ids(found.get(name)) != _ids(trained.get(name))
    ]


def _ids(value: object) -> set[object]:
    if value is None:
        return set()
    return set(value) if isinstance(value, Iterable) else {value}
