"""Token ids against the embedding's rows, once after loading: beyond them lies an IndexError, on a GPU a failed
assertion.
"""

from __future__ import annotations

from collections.abc import Iterable

from repbend_fast.config.schema import ModelConfig
from repbend_fast.data.sampling import Encoded
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model
from repbend_fast.models.load import read_model_config
from repbend_fast.runs.prepare import RunData

REMEDY = "use the tokenizer that belongs to the model, or a model whose embedding has a row for it"


def check_token_ids(model: CausalLM, data: RunData) -> str | None:
    """Compare the tokenizer's special tokens, the chat template's and the data's with the model's embedding.

    From here on ``data.encoder`` refuses any text with an id beyond it. Where the tokenizer has none beyond it, nothing
    is encoded.

    Returns:
        A note where the tokenizer has ids beyond the embedding that nothing of this run uses.

    Raises:
        UserError: names the token, its id and the embedding's size.
    """
    rows = causal_model(model).get_input_embeddings().weight.shape[0]
    encoder = data.encoder
    encoder.vocabulary = rows
    check_special_tokens(encoder.tokenizer, rows)
    beyond = {token: number for token, number in encoder.tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return None
    encoder.check_template()
    _check_data(data, rows)
    token = max(beyond, key=beyond.__getitem__)
    return (
        f"note: the model's embedding has {rows} rows, and {len(beyond)} of the tokenizer's ids are beyond it "
        f"({token} is {beyond[token]})"
    )


def check_special_tokens(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a pad, BOS or EOS token beyond ``rows``."""
    for kind in ("pad", "bos", "eos"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and number >= rows:
            token = getattr(tokenizer, f"{kind}_token")
            raise UserError(
                f"the tokenizer's {kind} token {token} has id {number}, but the model's embedding has {rows} rows; "
                f"{REMEDY}"
            )


def vocabulary_of(config: ModelConfig) -> int | None:
    """The embedding's rows by the model's configuration file; None where there is none that is quick to read."""
    if config.gguf_file:
        return None
    try:
        shape = read_model_config(config).get_text_config()
    except (UserError, OSError, ValueError, KeyError, AttributeError):
        return None
    return getattr(shape, "vocab_size", None)


def _check_data(data: RunData, rows: int) -> None:
    for records in data.sampler.sets.values():
        for i in range(len(records)):
            _check_ids(data, _ids(records[i]), rows)  # encoding names the record
    for of_role in data.held.values():
        for held in of_role:
            _check_ids(data, _ids(held), rows)
    for conversation in data.chat:
        _check_ids(data, conversation.ids, rows)


def _ids(example: Encoded) -> tuple[int, ...]:
    return example.ids if hasattr(example, "ids") else (*example.unsafe.ids, *example.safe.ids)


def _check_ids(data: RunData, ids: Iterable[int], rows: int) -> None:
    number = max(ids, default=0)
    if number >= rows:
        token = data.encoder.tokenizer.convert_ids_to_tokens(number)
        raise UserError(
            f"a held-out record holds {token}, id {number}, but the model's embedding has {rows} rows; {REMEDY}"
        )
