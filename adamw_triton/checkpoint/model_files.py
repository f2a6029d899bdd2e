"""A model's weights on disk, as transformers leaves them: read lazily, and written piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton.checkpoint import files
from adamw_triton.checkpoint.files import SAFETENSORS, CheckpointError
from adamw_triton.models.weights import ModelFileError, read_weight_map

MAIN = ("model.safetensors", "pytorch_model.bin")
"""A model's one file, or its index with ``.index.json`` behind; the first that is there counts."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Of dtypes, in a safetensors file."""


class Pieces(NamedTuple):
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: torch.Size
    flat: Callable[[], Iterable[Tensor]]
    """Parts of it, one-dimensional, one behind the other."""


def load(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of their main file, and the weights by name: read from the disk when they are used.

    Raises:
        CheckpointError: there are none, or a file is damaged.
        OSError: a file cannot be opened.
    """
    for main in MAIN:
        if (folder / main).exists():
            return main, _tensors(folder / main)
        index = folder / f"{main}.index.json"
        if index.exists():
            found = {}
            for name in _shards(index):
                found.update(_tensors(folder / name))
            return index.name, found
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter, and not the model that its parameters are named by: save "
            "optimizer.master_state_dict(model) where the model is in memory"
        )
    inner = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    where = f"; name one of its folders, {inner[-1]} say" if inner else ""
    raise CheckpointError(
        f"{folder} has no weights: neither {MAIN[0]} nor {MAIN[1]}, in one file or several{where}"
    )


def save(tensors: Mapping[str, Pieces], path: Path, track: Callable[[Iterable[str]], Iterable[str]]) -> None:
    """A safetensors file that transformers loads; ``path`` has all of it at once, or is as it was.

    Raises:
        CheckpointError: a dtype has no name there.
        OSError: it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # The widest first, as the library has them: so all lie where their dtype wants it.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        if dtype not in _NAMES:
            raise CheckpointError(f"{name!r} is of {dtype}, which a safetensors file cannot hold")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in track(order):
            for piece in tensors[name].flat():
                file.write(piece.view(torch.uint8).numpy().data)


def _shards(index: Path) -> list[str]:
    try:
        names = read_weight_map(index)
    except ModelFileError as error:
        raise CheckpointError(str(error)) from error
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} lists what is no file beside it: {name!r:.60}")
    return sorted(set(names.values()))


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == SAFETENSORS:
        return files.read_safetensors(path)[1]
    found = files.load(path)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is no model's state_dict")
    return {str(name): value.detach() for name, value in found.items()}
