"""Models and tokenizers have what ``CausalLM``, ``AdaptedLM`` and ``Tokenizer`` say of them; mypy takes it on trust."""

from __future__ import annotations

from typing import Protocol

import pytest
from chat_tokenizers import make
from tiny_models import FAMILIES, adapted_model, tiny_model

from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.models.causal import AdaptedLM, CausalLM, Shape


def members(protocol: type) -> set[str]:
    """Everything that a protocol and those below it ask for."""
    kinds = [kind for kind in protocol.__mro__ if Protocol in kind.__bases__]
    names = {name for kind in kinds for name in (*vars(kind), *vars(kind).get("__annotations__", {}))}
    return {name for name in names if not name.startswith(("__", "_abc_", "_is_"))}


def missing(protocol: type, thing: object) -> list[str]:
    return sorted(name for name in members(protocol) if not hasattr(thing, name))


def test_members_are_found() -> None:
    assert {"get_decoder", "generate", "config", "generation_config", "parameters"} <= members(CausalLM)
    assert {"disable_adapter", "peft_config", "get_decoder"} <= members(AdaptedLM)
    assert {"vocab_size", "_attn_implementation", "get_text_config"} <= members(Shape)
    assert missing(AdaptedLM, object()) == sorted(members(AdaptedLM))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_what_is_needed_of_them(family: str) -> None:
    model = tiny_model(family)
    assert missing(CausalLM, model) == []
    assert missing(Shape, model.config.get_text_config()) == []
    adapted = adapted_model(family)
    assert missing(AdaptedLM, adapted) == []
    assert missing(CausalLM, adapted.get_base_model()) == []


def test_tokenizers_have_what_is_needed_of_them() -> None:
    assert missing(Tokenizer, make()) == []
