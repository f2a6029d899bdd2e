"""Byte counts as text."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "b": 1}
UNITS |= {prefix + "b": 1000**power for power, prefix in enumerate("kmgt", 1)}
UNITS |= {prefix + "ib": 1024**power for power, prefix in enumerate("kmgt", 1)}

_BARE = 1 << 16
"""Nobody gives memory of fewer bytes than these as a number alone."""


def parse_bytes(value: object, name: str) -> int:
    """Bytes from an int or from text like ``"4GiB"``, ``"500 MB"``; ``name`` is the argument's.

    Raises:
        ValueError: it is neither, or negative, or text so small without a unit that gibibytes were meant.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        size = float(found[1]) * UNITS.get(found[2].lower(), math.inf) if found else math.inf
        if found and not found[2] and 0 < size < _BARE:
            raise ValueError(f"Invalid {name}: {value!r} has no unit and means bytes: write it like '24GiB'")
        if size < math.inf:
            return int(size)
    raise ValueError(
        f"Invalid {name}: {value!r}; it must be a number of bytes >= 0, or text like '4GiB' or '500MB'"
    )


def format_bytes(count: int) -> str:
    """``count`` in the largest unit of 1,024s that leaves a number of at least 1."""
    if count < 0:
        return f"-{format_bytes(-count)}"
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    for unit in units:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
