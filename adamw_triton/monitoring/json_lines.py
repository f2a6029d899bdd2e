"""Statistics as JSON lines: a file that every tool reads, and that a run which died leaves whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

INFINITE = 1e999
"""What JSON's numbers end beyond: readers of floats make infinity of it."""


class JsonLines:
    """A file with one JSON object a line, written at once.

    Strict JSON: NaN is ``null``, infinity ``1e999``, which readers of floats take for it. What is there
    already stays: a resumed run goes on below.

    Args:
        path: of the file, which is made if need be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Line by line: what another process reads, and a crash leaves, are whole lines.
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._step: float | None = None

    def write(self, stats: Mapping[str, float], **more: float) -> None:
        """Append what ``optimizer.stats()`` gave, and ``more`` beside it (``loss=...``). Nothing if it is
        empty, or of the same step as the last one: no step has been collected since."""
        step = stats.get("step")
        if not stats or (step is not None and step == self._step):
            return
        self._step = step
        pairs = ", ".join(f"{json.dumps(k)}: {_text(v)}" for k, v in {**stats, **more}.items())
        self._file.write(f"{{{pairs}}}\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """What was written, in order. A last line that was cut off, because the machine died, is left out.

    Raises:
        ValueError: another line is none of ours; names it.
    """
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline there is nothing, or half a line
        try:
            read = {key: math.nan if value is None else float(value) for key, value in _object(line).items()}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {os.fspath(path)} is no JSON object of numbers: {error}"
            ) from error
        found.append(read)
    return found


def _object(line: str) -> dict[str, Any]:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise TypeError(f"it is a {type(found).__name__}")
    return found


def _text(value: float) -> str:
    value = float(value)
    if math.isnan(value):
        return "null"
    if math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value)
