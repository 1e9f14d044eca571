"""Runs to export: a tiny base of a family with a tokenizer, and an adapter that bends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tiny_models import FAMILIES
from tiny_run import byte_tokenizer, records, write_records
from torch import nn

from repbend_fast.config import Config, resolved_yaml
from repbend_fast.config.schema import LoraConfig, ModelConfig
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.models import attach_lora, load_model
from repbend_fast.runs.folder import RunFolder
from repbend_fast.training.checkpoint import save_adapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class ExportRun:
    """``own``: an adapter that the model had before the run. ``targets``: layers with LoRA, None for all."""

    folder: Path
    family: str = "llama"
    dtype: str = "float32"
    quantization: str = "none"
    tied: bool = False
    own: bool = False
    targets: tuple[str, ...] | None = None
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def write(self) -> ExportRun:
        """Base, own adapter, and the folder of a run with a trained adapter."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_base()
        data = write_records(self.folder / "train.jsonl", records())
        own = {"adapter": str(self._write_own())} if self.own else {}
        model = ModelConfig(name=str(self.base), dtype=self.dtype, device="cpu", quantization=self.quantization, **own)
        config = Config(model=model, data=DataConfig(sources=[SourceConfig(path=str(data))]))
        run = RunFolder(self.run)
        run.path.mkdir()
        run.config.write_text(resolved_yaml(config), encoding="utf-8")
        save_adapter(bent(load_model(config.model), self._lora(3), seed=11), run.adapter)
        return self

    def trained(self) -> Any:
        """Base, own adapter and the run's adapter, put together by PEFT alone."""
        from peft import PeftModel

        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=getattr(torch, self.dtype))
        if self.own:
            model = PeftModel.from_pretrained(model, str(self.folder / "own")).merge_and_unload()
        return PeftModel.from_pretrained(model, str(RunFolder(self.run).adapter)).eval()

    def _lora(self, rank: int) -> LoraConfig:
        targets = {} if self.targets is None else {"target_modules": list(self.targets)}
        return LoraConfig(r=rank, alpha=2 * rank, dropout=0.0, **targets)

    def _write_base(self) -> None:
        tokenizer = byte_tokenizer()
        config = FAMILIES[self.family]()
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        settings = {"vocab_size": len(tokenizer), "tie_word_embeddings": self.tied} | ends | self.shape
        for name, value in settings.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=0.0 if "bias" in name or "gemma" in self.family else 1.0, std=0.2)
        model.to(getattr(torch, self.dtype)).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)

    def _write_own(self) -> Path:
        model = load_model(ModelConfig(name=str(self.base), dtype=self.dtype, device="cpu"))
        save_adapter(bent(model, self._lora(2), seed=5), self.folder / "own")
        return self.folder / "own"


def bent(base: Any, lora: LoraConfig, seed: int) -> Any:
    """LoRA around ``base`` with random products."""
    model = attach_lora(base, lora, (2, 3))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in cast(nn.Module, model).named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def greedy(model: Any, ids: torch.Tensor, count: int = 12) -> list[int]:
    """[1, T] and the next ``count`` tokens."""
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    return ids[0].tolist()
