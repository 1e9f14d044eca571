"""What the project needs of a tokenizer: transformers' own have it, and so has a stand-in of a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, Protocol


class Tokenizer(Protocol):
    """A tokenizer of transformers, by what is called and read of it here."""

    chat_template: str | None

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text; None where there is none."""

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text; None where there is none."""

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills up a shorter row; ``load_tokenizer`` chooses one where the tokenizer has none."""

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that are no text."""

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, object]:
        """What was added to the vocabulary, by id."""

    def __len__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> Mapping[str, Sequence[int]]:
        """``input_ids`` of one text."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, object]], *, tokenize: Literal[False], **arguments: object
    ) -> str:
        """The conversation as the model was trained to see it."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **arguments: object) -> str:
        """The text of ``ids``."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text."""

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of several."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The token of one id."""

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""

    def save_pretrained(self, save_directory: str | PathLike[str]) -> object:
        """Write the tokenizer's files into a folder."""
