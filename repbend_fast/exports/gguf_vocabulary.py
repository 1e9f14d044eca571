"""A tokenizer as GGUF holds it: tokens, kinds, merges or scores, special ids, template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's kinds of tokens."""

Plain = Mapping[str, object]


class _Fast(Protocol):
    def to_str(self) -> str: ...


@dataclass(frozen=True)
class Vocabulary:
    """``model``: ``gpt2`` for byte-level BPE, with ``merges``, or ``llama`` for SentencePiece, with ``scores``.
    ``pre``: llama.cpp's name of how text is split before.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_space_prefix: bool
    template: str | None


# How text is split, in llama.cpp's names. It knows them by name alone, so a split that is none of these is refused.
_SPLITS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "qwen2",
}


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of ``tokenizer``, filled up to the ``rows`` of the embedding.

    Raises:
        UserError: no fast tokenizer, or one whose kind or split has no name in GGUF that is known here.
    """
    backend = cast("_Fast | None", getattr(tokenizer, "backend_tokenizer", None))
    if backend is None:
        raise UserError(f"gguf: {type(tokenizer).__name__} is no fast tokenizer, and no other can be written; {REMEDY}")
    plain = cast(Plain, json.loads(backend.to_str()))
    model = _part(plain, "model")
    if model.get("type") != "BPE":
        raise UserError(f"gguf: a tokenizer of kind {model.get('type')} cannot be written; {REMEDY}")
    bytes_alone = bool(model.get("byte_fallback"))
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise UserError(f"gguf: the tokenizer has id {max(by_id)}, and the embedding {rows} rows")
    tokens = [by_id.get(row, f"[PAD{row}]") for row in range(rows)]
    added = tokenizer.added_tokens_decoder
    kinds = [_kind(row, tokens[row], row in by_id, added, tokenizer, bytes_alone) for row in range(rows)]
    merges = [_merge(each) for each in cast(Sequence[object], model.get("merges") or [])]
    return Vocabulary(
        "llama" if bytes_alone else "gpt2",
        "default" if bytes_alone else _split_name(plain),
        tokens,
        kinds,
        merges,
        _scores(tokens, merges) if bytes_alone else [],
        _special(tokenizer),
        _adds_bos(tokenizer),
        _adds_space(plain),
        tokenizer.chat_template,
    )


REMEDY = "export --format merged, and convert that folder with llama.cpp's own convert_hf_to_gguf.py"


def _part(plain: Plain, name: str) -> Plain:
    return cast(Plain, plain.get(name) or {})


def _kind(row: int, token: str, known: bool, added: Mapping[int, object], tokenizer: Tokenizer, bytes_: bool) -> int:
    if not known:
        return UNUSED
    if row == getattr(tokenizer, "unk_token_id", None) and bytes_:
        return UNKNOWN
    if row in added:
        return CONTROL if getattr(added[row], "special", False) else USER_DEFINED
    return BYTE if bytes_ and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _merge(merge: object) -> str:
    return merge if isinstance(merge, str) else " ".join(cast(Sequence[str], merge))


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """SentencePiece joins the pair of highest score first, as BPE the one of the first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _split_name(plain: Plain) -> str:
    splitting = _part(plain, "pre_tokenizer")
    parts = cast(Sequence[Plain], splitting.get("pretokenizers") or [splitting])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    split = _SPLITS.get(str(_part(parts[0], "pattern").get("Regex")))
    if split and kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        return split
    raise UserError(
        "gguf: llama.cpp knows a tokenizer's split by name, and this one is none of those known here (gpt-2, smollm, "
        f"llama-bpe, qwen2); {REMEDY}"
    )


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    found = {name: getattr(tokenizer, attribute, None) for name, attribute in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _adds_bos(tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode("a", add_special_tokens=True)
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _adds_space(plain: Plain) -> bool:
    parts = [_part(plain, "normalizer"), _part(plain, "pre_tokenizer")]
    for part in parts:
        for each in cast(Sequence[Plain], part.get("normalizers") or part.get("pretokenizers") or [part]):
            if each.get("type") == "Prepend" or (
                each.get("type") == "Metaspace" and each.get("prepend_scheme") in ("always", "first")
            ):
                return True
    return False
