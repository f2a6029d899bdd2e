"""What people name that holds no weights which can be counted: what it is, and what to name instead."""

from __future__ import annotations

import re
from pathlib import Path

from adamw_triton.models.weights import ModelFileError

_OTHERWISE = "name a folder with the model's config.json"
_FORMATS = {
    r"\.gguf": "GGUF, a format of llama.cpp for running models: name the folder of the original model",
    r"\.bin\.index\.json": f"an index of pickles, which are not opened: {_OTHERWISE}",
    r"\.(bin|pt|pth|ckpt|pkl)": f"a pickle of PyTorch, which is not opened: {_OTHERWISE}, or convert it",
    r"\.(h5|msgpack|onnx|tflite|npz)": f"weights for another library: {_OTHERWISE}",
}
"""By the end of a file's name."""
_ADAPTER = "a PEFT adapter: name the folder of its base model, and --lora"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def refuse_missing(path: Path) -> ModelFileError:
    """Of a path where nothing is."""
    name = str(path)
    how = f": hf download {name} config.json --local-dir {path.name}" if _HUB_NAME.fullmatch(name) else ""
    return ModelFileError(
        f"there is no file or folder {name!r}; a model of the Hugging Face Hub must be downloaded first, its "
        f"config.json is enough{how}"
    )


def check_file(path: Path) -> None:
    """Refuse by name what is neither safetensors, their index nor a config.json.

    Raises:
        ModelFileError: it says what the file is, and what to name.
    """
    if path.name in ("adapter_config.json", "adapter_model.safetensors"):
        raise ModelFileError(f"{path} is of {_ADAPTER}")
    if _SHARD.search(path.name):
        raise ModelFileError(f"{path} is one file of several: name its folder, or its index")
    for ending, what in _FORMATS.items():
        if re.search(f"{ending}$", path.name):
            raise ModelFileError(f"{path} is {what}")


def check_folder(path: Path) -> None:
    """Refuse by name a folder that holds something else than a model.

    Raises:
        ModelFileError: as of ``check_file``.
    """
    if (path / "adapter_config.json").exists():
        raise ModelFileError(f"{path} holds {_ADAPTER}")
    if (path / "model_index.json").exists():
        raise ModelFileError(f"{path} is a pipeline of diffusers: name the folder of one of its models")
    if (path / "snapshots").is_dir() and not (path / "config.json").exists():
        raise ModelFileError(f"{path} is a cache of the Hugging Face Hub: name a folder in its snapshots")


def refuse_bare(path: Path, config: bool) -> None:
    """Refuse a folder without safetensors files, unless its config.json can be counted from. That beside a
    GGUF file often says next to nothing.

    Raises:
        ModelFileError: as of ``check_file``.
    """
    names = sorted(entry.name for entry in path.iterdir())
    for ending, what in _FORMATS.items():
        held = next((name for name in names if re.search(f"{ending}$", name)), None)
        if held is not None and (not config or ending == r"\.gguf"):
            raise ModelFileError(f"{path} has {held!r}, {what}")
    if not config:
        empty = "" if names else ": it is empty"
        raise ModelFileError(f"{path} has neither safetensors files nor a config.json{empty}")
