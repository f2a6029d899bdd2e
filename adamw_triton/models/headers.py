"""Names, shapes and dtypes from the headers of safetensors files.

A file is an unsigned 64-bit length, a JSON object of that length, and the data (source: the README of
huggingface/safetensors). Only the first two are read, so tens of gigabytes cost a few kilobytes. The
library's own reader takes the last of two tensors of one name; here that, like everything that the
format forbids, is an error. The tests hold the two readers against each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from adamw_triton.models.weights import (
    JSON_LIMIT,
    IncompleteError,
    ModelFileError,
    Weight,
    cannot_read,
    check_regular,
    parse_json,
    read_weight_map,
)

BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
LARGEST = 1 << 63
"""Elements, bytes: nothing that exists has as many."""
_LFS_POINTER = b"version https://git-lfs"
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


class _Entry(NamedTuple):
    weight: Weight
    begin: int
    end: int


def read_header(path: Path) -> list[Weight]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        ModelFileError: it cannot be read, or is not as the format demands.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start == _LFS_POINTER[:8] and start + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise ModelFileError(f"{path} is a pointer of Git LFS and not the file itself: git lfs pull")
            length = int.from_bytes(start, "little")
            if size < 8:
                raise ModelFileError(f"{path} is not a safetensors file: it has {size} bytes")
            if length > JSON_LIMIT:
                raise ModelFileError(
                    f"{path} is not a safetensors file: it announces a header of {length:,} bytes; the "
                    f"format allows {JSON_LIMIT:,}"
                )
            if length > size - 8:
                raise ModelFileError(
                    f"{path} is truncated: it announces a header of {length:,} bytes and has {size - 8:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from None
    return _check(path, text, size - 8 - length)


def read_shards(index: Path) -> list[Weight]:
    """The tensors of a model in several files, which ``index`` (``*.safetensors.index.json``) lists."""
    table = read_weight_map(index)
    for name in table.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ModelFileError(f"{index} lists what is not a safetensors file beside it: {_short(name)}")
        if not (index.parent / name).exists():
            raise IncompleteError(f"{index} lists {name!r}, which is not there: is the download complete?")
    weights = []
    for name in dict.fromkeys(table.values()):
        weights += [weight for weight in read_header(index.parent / name) if table.get(weight.name) == name]
    missing = table.keys() - {weight.name for weight in weights}
    if missing:
        raise ModelFileError(f"{index} lists {min(missing)!r}, which {table[min(missing)]!r} does not have")
    return weights


def _check(path: Path, text: bytes, data_bytes: int) -> list[Weight]:
    header = parse_json(text, f"the header of {path}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, Mapping) or not all(isinstance(text, str) for text in metadata.values()):
        raise ModelFileError(f"the header of {path} is wrong: its __metadata__ is not text by name")
    entries = sorted((_entry(path, *item) for item in header.items()), key=lambda entry: entry[1:])
    end, before = 0, "the header"
    for entry in entries:
        if entry.begin != end:
            wrong = "overlaps" if entry.begin < end else "leaves a hole behind"
            raise ModelFileError(f"the header of {path} is wrong: {entry.weight.name!r} {wrong} {before}")
        end, before = entry.end, repr(entry.weight.name)
    if end != data_bytes:
        wrong = "is truncated" if end > data_bytes else "is no safetensors file"
        raise ModelFileError(f"{path} {wrong}: its tensors take {end:,} bytes and it has {data_bytes:,}")
    return [entry.weight for entry in entries]


def _entry(path: Path, name: str, info: object) -> _Entry:
    def wrong(what: str, value: object) -> ModelFileError:
        return ModelFileError(f"the header of {path} is wrong: {name!r} has {what} {_short(value)}")

    if not isinstance(info, Mapping):
        raise wrong("the description", info)
    dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong("the unknown dtype", dtype)
    if not _is_sizes(shape):
        raise wrong("the shape", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("the data_offsets", offsets)
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits > LARGEST:
            raise wrong("more elements than anything has: shape", shape)
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise wrong(f"{end - begin:,} bytes and needs {bits / 8:,.0f}, by its dtype {dtype} and shape", shape)
    return _Entry(Weight(name, tuple(shape), dtype), begin, end)


def _is_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and all(type(size) is int and 0 <= size < LARGEST for size in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
