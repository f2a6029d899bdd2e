"""Safetensors files as tests want them: true ones of any size, and false ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamw_triton.models.headers import BITS


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> tuple[dict[str, Any], int]:
    """A true header, and the bytes of data it tells of."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header, end


def write(path: Path, header: Any, data_bytes: int, *, announced: int | None = None) -> Path:
    """``header``: bytes as they are, or what JSON they are to be. The data is a hole in the file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write((len(text) if announced is None else announced).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data_bytes)
    return path


def write_model(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    return write(path, *header_of(shapes, dtype))
