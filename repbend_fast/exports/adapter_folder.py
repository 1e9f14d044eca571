"""The adapter alone, in PEFT format, for the base as everybody loads it: one that the run's own model had before is put
into it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from repbend_fast.config import Config
from repbend_fast.errors import UserError
from repbend_fast.exports.low_rank import LowRank, LowRanks, NotPlainError
from repbend_fast.models.load import model_parts
from repbend_fast.nearby import own_path
from repbend_fast.runs.stored import write_tensors


def write_adapter(config: Config, adapter: Path, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    Raises:
        UserError: the run's model has an adapter of its own that is no plain LoRA.
    """
    source, own = model_parts(config.model)
    if not own:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapter / name, folder / name)
        return
    try:
        below = [LowRanks(own_path(name)) for name, _ in own if own_path(name).is_dir()]
        if len(below) < len(own):
            raise NotPlainError("it is on the hub")
        _write_stacked([*below, LowRanks(adapter)], source, folder)
    except NotPlainError as error:
        raise UserError(
            f"{own[0][1]}={own[0][0]}: the model had this adapter before the run, and one file cannot hold both "
            f"({error}); use --format merged"
        ) from error


def _write_stacked(adapters: list[LowRanks], source: str, folder: Path) -> None:
    """One adapter that does what all of them do, one on the other: B A + B' A' is [B B'] [A; A']."""
    from peft import LoraConfig

    products: dict[str, LowRank] = {}
    for adapter in adapters:
        for layer in adapter.layers:
            products[layer] = adapter[layer].on(products[layer]) if layer in products else adapter[layer].alone()
    ranks = {layer: product.rank for layer, product in products.items()}
    usual = max(ranks.values())
    others = {_exactly(layer): rank for layer, rank in ranks.items() if rank != usual}
    settings = LoraConfig(
        r=usual,
        lora_alpha=usual,
        lora_dropout=0.0,
        target_modules=sorted(products),
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=source,
    )
    settings.save_pretrained(str(folder))
    names = {
        f"base_model.model.{layer}.lora_{side}.weight": tensor.contiguous()
        for layer, product in products.items()
        for side, tensor in (("A", product.a), ("B", product.b))
    }
    write_tensors(folder / "adapter_model.safetensors", names)


def _exactly(layer: str) -> str:
    """PEFT reads a pattern's keys as regular expressions."""
    return layer.replace(".", r"\.")
