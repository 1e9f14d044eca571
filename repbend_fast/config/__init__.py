"""Configuration: schema, recipes, overrides, published argument names."""

from repbend_fast.config.files import check_files, missing_files
from repbend_fast.config.resolve import load_config, resolved_yaml
from repbend_fast.config.schema import (
    Config,
    EvaluationConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    TrainingConfig,
    ValidationConfig,
)
from repbend_fast.config.shipped import copy_recipe, recipe_names, recipe_text, summary
from repbend_fast.data.settings import DataConfig, PromptsConfig, SourceConfig

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OutputConfig",
    "PromptsConfig",
    "SourceConfig",
    "TrainingConfig",
    "ValidationConfig",
    "check_files",
    "copy_recipe",
    "load_config",
    "missing_files",
    "recipe_names",
    "recipe_text",
    "resolved_yaml",
    "summary",
]
