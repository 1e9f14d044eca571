"""Merge an adapter of the user's own into the weights, whatever its kind: the reference, which is the model as loaded,
has it too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM
from repbend_fast.nearby import own_path

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

NO_MERGE = (
    "only adapters that change weights (LoRA, DoRA, IA3, modules_to_save, trainable tokens …) can be merged; "
    "name a model without it"
)


@contextmanager
def adapter_apart(source: str) -> Iterator[str]:
    """A folder with the model's files alone where an adapter lies beside them; any other source as it is.

    transformers would put that adapter into the model by itself, unmerged, where it is switched off with the trained
    one.

    Raises:
        UserError: the system makes no links.
    """
    if not (Path(source) / "adapter_config.json").is_file():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="repbend-model-") as folder:
        try:
            for path in Path(source).resolve().iterdir():
                if path.name != "adapter_config.json":
                    (Path(folder) / path.name).symlink_to(path, target_is_directory=path.is_dir())
        except OSError as error:
            raise UserError(
                f"{source}: its adapter cannot be read apart ({one_line(error)}); move it and set model.adapter"
            ) from error
        yield folder


def merge_adapter(model: CausalLM, adapter: str, setting: str, revision: str | None = None) -> CausalLM:
    """``model`` with the adapter in the folder, or of the hub name, ``adapter`` merged into its weights.

    Args:
        setting: the setting that brought it, for messages.
        revision: of the adapter on the hub.

    Raises:
        UserError: not safetensors, of a kind that no weights can hold, or not made for this model.
    """
    with _applying(adapter, setting):
        adapted, tied = _put(model, adapter, setting, revision, part_ends=True)
        try:
            merged = adapted.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as error:
            kind = _name(adapted.peft_config[adapted.active_adapter])
            raise UserError(
                f"{setting}={adapter}: an adapter of kind {kind} has no merge ({one_line(error)}); {NO_MERGE}"
            ) from error
    if tied:
        _join_ends(merged)
    return merged


def put_adapter(model: CausalLM, adapter: str, setting: str, revision: str | None = None) -> CausalLM:
    """``model`` in a peft model with the adapter on it, frozen and unmerged: NF4 weights stay what they are.

    Args and errors are those of :func:`merge_adapter`, but an adapter needs no merge.
    """
    with _applying(adapter, setting):
        adapted, _ = _put(model, adapter, setting, revision, part_ends=False)
    return cast(CausalLM, adapted.requires_grad_(False).eval())


@contextmanager
def _applying(adapter: str, setting: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # peft takes settings as they are, and trips over one anywhere
        raise UserError(f"{setting}={adapter}: cannot be applied to this model ({one_line(error)})") from error


def _put(
    model: CausalLM, adapter: str, setting: str, revision: str | None, *, part_ends: bool
) -> tuple[PeftModel, bool]:
    """The peft model, and whether a head that was tied to the embedding got a weight of its own."""
    from peft import PeftModel

    folder = own_path(adapter)
    source = str(folder) if folder.is_dir() else adapter
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{setting}={adapter}: no adapter_model.safetensors in this folder; only safetensors adapters are read"
        )
    kind = adapter_settings(source, revision)
    if kind.is_prompt_learning:
        raise UserError(
            f"{setting}={adapter}: an adapter of kind {_name(kind)} adds virtual tokens, no weights; {NO_MERGE}"
        )
    weights = _weights(source, revision)
    _make_room(model, weights)
    tied = part_ends and _part_ends(model)
    adapted = PeftModel.from_pretrained(cast(nn.Module, model), source, config=kind, revision=revision)
    _check_places(adapted, weights)
    return adapted, tied


def adapter_settings(source: str, revision: str | None = None) -> PeftConfig:
    """What PEFT reads of ``adapter_config.json``.

    Raises:
        ValueError: a setting within a setting is unknown to PEFT, which then asks itself again for ever.
        Exception: anything else that PEFT trips over.
    """
    from peft import PeftConfig, __version__

    try:
        return PeftConfig.from_pretrained(source, revision=revision)
    except RecursionError as error:
        raise ValueError(
            f"a setting inside of one in its adapter_config.json is unknown to PEFT {__version__}; a later one may "
            "know it"
        ) from error


def _name(kind: PeftConfig) -> str:
    return str(getattr(kind.peft_type, "value", kind.peft_type)).lower().replace("_", " ")


def _weights(source: str, revision: str | None) -> dict[str, torch.Tensor]:
    from peft import load_peft_weights

    arguments: dict[str, Any] = {"revision": revision} if revision else {}
    return load_peft_weights(source, device="cpu", **arguments)


def _make_room(model: CausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Add the rows of tokens that the adapter's own embedding or head has and the model's has not."""
    ends = {module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    names = tuple(
        f".{name}{inner}.weight"
        for name, module in model.named_modules()
        if module in ends
        for inner in ("", ".base_layer")
    )
    rows = max((w.shape[0] for key, w in weights.items() if key.endswith(names)), default=0)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _check_places(adapted: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """peft drops tensors of layers that the model does not have, and says nothing."""
    from peft import get_peft_model_state_dict

    own = {name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters()}
    homeless = {
        key
        for key in weights.keys() - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if key.removeprefix("base_model.model.") not in own
        and key.replace(".modules_to_save.", ".") not in weights.keys() - {key}
    }
    if homeless:
        raise ValueError(f"{len(homeless)} of its tensors have no place here, {min(homeless)} for one")


def _part_ends(model: CausalLM) -> bool:
    """Give a head that shares its weight with the embedding a copy: an adapter of the one alone would be merged into
    both.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return tied


def _join_ends(model: CausalLM) -> None:
    """Share the weight again where the merge left both equal; else say so in the configuration, or a saved copy would
    be tied.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    same = torch.equal(head.weight, embedding.weight)
    if same:
        head.weight = embedding.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = same
