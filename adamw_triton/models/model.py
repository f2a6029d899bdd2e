"""A model on disk: a folder, a safetensors file, or a config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adamw_triton.models.config import Dimensions, read_dimensions, read_dtype
from adamw_triton.models.families import weights_of
from adamw_triton.models.headers import read_header, read_shards
from adamw_triton.models.weights import ModelFileError, Weight, cannot_read, read_json


class Model(NamedTuple):
    """What its files say of it."""

    name: str
    weights: Sequence[Weight]
    dimensions: Dimensions | None
    """None where no config.json says them."""


def read_model(path: Path) -> Model:
    """Read the headers of all its safetensors files; without any, tell its weights from config.json.

    Raises:
        ModelFileError: there is nothing at ``path``, or not what there should be.
    """
    try:
        return _read(path)
    except OSError as error:  # of looking about; whoever opens a file names that one
        raise cannot_read(path, error) from None


def _read(path: Path) -> Model:
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise ModelFileError(
            f"there is no file or folder {str(path)!r}; a model of the Hugging Face Hub must be downloaded "
            "first"
        )
    if path.name.endswith(".json"):
        return _from_config(path.resolve().parent.name, read_json(path))
    config = _config(path.parent) or {}
    return Model(path.name, _some(read_header(path), path), read_dimensions(config))


def _folder(path: Path) -> Model:
    name = path.resolve().name
    if (path / "adapter_config.json").exists():
        raise ModelFileError(f"{path} holds a PEFT adapter: name the folder of its base model, and --lora")
    config = _config(path)
    weights = _read_weights(path)
    if weights is not None:
        return Model(name, _some(weights, path), read_dimensions(config or {}))
    if config is None:
        raise ModelFileError(f"{path} has neither safetensors files nor a config.json")
    return _from_config(name, config)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return read_json(path) if path.exists() else None


def _read_weights(folder: Path) -> list[Weight] | None:
    """By its index, or its one file, or all its files; None where it has none."""
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: not _is_main(path))
    if indexes:
        return read_shards(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    main = [file for file in files if _is_main(file)]
    if not files:
        return None
    weights = [weight for file in main or files for weight in read_header(file)]
    if len({weight.name for weight in weights}) < len(weights):
        raise ModelFileError(
            f"{folder} has several safetensors files with the same tensors: name one of them"
        )
    return weights


def _is_main(path: Path) -> bool:
    """The name that transformers gives it."""
    return path.name.startswith("model.safetensors")


def _some(weights: list[Weight], path: Path) -> list[Weight]:
    if not weights:
        raise ModelFileError(f"{path} has no tensors")
    return weights


def _from_config(name: str, config: dict[str, Any]) -> Model:
    if config.get("quantization_config") is not None:
        raise ModelFileError("config.json tells of quantized weights: their safetensors files are needed too")
    dtype = read_dtype(config) or "F32"  # as transformers takes it
    return Model(name, weights_of(config, dtype), read_dimensions(config))
