"""A weight as files describe it, and the one error that all of this room raises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

JSON_LIMIT = 100_000_000
"""Bytes; the limit that the safetensors format sets itself, taken for every file here."""


class ModelFileError(ValueError):
    """A file is not what it should be; the message, of one line, names it and says why."""


class Weight(NamedTuple):
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: "F32", "BF16", ..."""
    linear: bool = True
    """False: known to be no projection, whatever its name and shape say: an embedding, or the head."""
    trained: bool = True
    """False: the architecture itself freezes it, as Whisper does its positions."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class IncompleteError(ModelFileError):
    """An index lists files that are not there."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook``: JSON leaves open which of two equal keys counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which is no JSON")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``data``; ``what`` names it in errors."""
    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ModelFileError(f"{what} is not valid JSON: it nests too deeply") from None
    except ValueError as error:  # of json, of the hooks, of UTF-8, of numbers with thousands of digits
        raise ModelFileError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{what} is not a JSON object but {type(found).__name__}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise cannot_read(path, error) from None
    if len(data) > JSON_LIMIT:
        raise ModelFileError(f"{path} is larger than the {JSON_LIMIT:,} bytes that are read of such files")
    return parse_json(data, str(path))


def read_weight_map(index: Path) -> dict[str, Any]:
    """Of a model in several files: the file of each tensor, as ``index`` (``*.index.json``) lists them."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelFileError(f"{index} has no weight_map")
    return table


def check_regular(path: Path) -> None:
    """Refuse pipes and devices, which may have no end."""
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{path} is not a regular file")


def cannot_read(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"cannot read {path}: {error.strerror or error}")
